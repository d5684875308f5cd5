"""Uploading a folder to a Hugging Face repository."""

from __future__ import annotations

import os
from pathlib import Path

from lpvit_cli.errors import EnvironmentFault, UsageError, escaped


def require_repository_name(name: str) -> None:
    """Raises UsageError unless `name` is OWNER/NAME as the hub takes it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UsageError(
            f"--push {name}: not the name of a Hugging Face repository", "give OWNER/NAME, for example: --push me/deit-pruned"
        )


def push(folder: Path, repository: str, show_progress: bool = False) -> str:
    """Upload `folder` to the model repository OWNER/NAME, which is made, private, where there is none.
    Returns its address, without credentials.

    An ONNX file of an earlier push that `folder` no longer has is removed; other files of the repository stay. The hub is
    that of $HF_ENDPOINT, if set. Raises EnvironmentFault: no token, refused, out of reach.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HfHubHTTPError, disable_progress_bars

    if get_token() is None:
        raise EnvironmentFault(
            f"--push {repository}: no Hugging Face token here", f"run `hf auth login`, then push again; ready in {folder}"
        )
    if not show_progress:
        disable_progress_bars()
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="lpvit export", delete_patterns=["model.onnx*"]
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        told = f": {error.server_message}" if error.server_message else ""
        raise EnvironmentFault(
            f"--push {repository}: refused by {hub.endpoint} ({status}){told}",
            f"run `hf auth login` with a token that may write there, then push again; ready in {folder}",
        ) from error
    except Exception as error:  # the hub client's versions raise kinds of requests, httpx and xet
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise EnvironmentFault(
            f"--push {repository}: cannot upload to {hub.endpoint} ({reason})",
            f"check the network, then push again; ready in {folder}",
        ) from error
    return escaped(str(address))
