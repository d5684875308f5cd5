"""A Hugging Face repository: what may be told of a run outside this machine, the model card, and the upload."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.export.documents import document
from lpvit_cli.measure.accuracy import Accuracy
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe_source import PATHS
from lpvit_cli.report.schema import BenchReport, ExportedFile, FinetuneReport, PruneReport
from lpvit_cli.report.tables import giga, interval, percent, size


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """A model folder's config.json without the paths of this machine: neither where the images lie nor the parent."""
    public = {key: value for key, value in config.items() if key != "parent"}
    if "data" in public:
        public["data"] = {key: value for key, value in public["data"].items() if key != "root"}
    return public


def public_recipe(recipe: Recipe) -> tuple[str, list[str]]:
    """The recipe as YAML with file names for paths, and these names: they are meant from the recipe's own folder."""
    content: dict[str, Any] = recipe.model_dump(mode="json")
    names = []
    for *sections, key in sorted(PATHS):
        section: Any = content
        for name in sections:
            section = section and section[name]  # a section may be left out
        if section and (path := section[key]):
            section[key] = Path(path).name
            names.append(f"`{'.'.join([*sections, key])}` is `{Path(path).name}`")
    return yaml.safe_dump(content, sort_keys=False), names


def model_card(
    recipe: Recipe,
    pruned: PruneReport,
    finetuned: FinetuneReport | None,
    bench: BenchReport | None,
    onnx: ExportedFile | None,
    onnx_device: str,
    onnx_notes: list[str],
    preprocessing: list[str],
    input_size: tuple[int, int, int],
    versions: dict[str, str | None],
) -> str:
    """README.md: front matter, then what the reports say; what none of them measured is called not measured."""
    return document(
        "model_card.md",
        recipe=recipe,
        base_model=recipe.model.name.removeprefix("hf-hub:") if recipe.model.name.startswith("hf-hub:") else None,
        pruned=pruned,
        finetuned=finetuned,
        bench=bench,
        onnx=onnx,
        onnx_device=onnx_device,
        onnx_notes=onnx_notes,
        blocks=", ".join(sorted({f"{rows}x{columns}" for rows, columns in (layer.block for layer in pruned.layers)})),
        accuracies=_accuracies(recipe, pruned, finetuned, onnx),
        files_needed=public_recipe(recipe)[1],
        preprocessing=preprocessing,
        input_size=input_size,
        versions=", ".join(f"{package} {number}" for package, number in versions.items() if number),
        giga=giga,
        interval=interval,
        percent=percent,
        size=size,
    )


def _accuracies(
    recipe: Recipe, pruned: PruneReport, finetuned: FinetuneReport | None, onnx: ExportedFile | None
) -> dict[str, Accuracy | None]:
    """By row of the card's table; None: not measured."""
    rows: dict[str, Accuracy | None] = {
        "dense": pruned.accuracy_dense,
        "pruned, one-shot": pruned.accuracy,
        "recovered": finetuned.accuracy if finetuned else None,
    }
    if onnx:
        rows[f"ONNX file, {recipe.export.precision}"] = onnx.accuracy
    return rows


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
    """Upload `folder` to the model repository OWNER/NAME, which is made, private, where there is none; its address.

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
    return str(address)
