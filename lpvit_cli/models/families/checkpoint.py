"""Checkpoints of Hugging Face, in a folder or a repository of the hub: their files, and what their libraries complain of."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lpvit_cli.errors import EnvironmentFault, LpvitError, UsageError
from lpvit_cli.models.tensors import pickled
from lpvit_cli.recipe.model import TRANSFORMERS

# arguments by which timm and transformers read files, which may be pickles, or fetch weights and code
SOURCES = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_model_name_or_path"}


def refuse_sources(kwargs: Any) -> None:
    """Raise UsageError where arguments of an architecture name weights or code from elsewhere."""
    inside = kwargs.items() if isinstance(kwargs, Mapping) else enumerate(kwargs) if isinstance(kwargs, list | tuple) else ()
    for key, value in inside:
        kernels = str(key).endswith("attn_implementation") and "/" in str(value)  # a repository of them
        if key in SOURCES or kernels:
            raise UsageError(
                f"model.kwargs: {key} would fetch weights or code from elsewhere",
                "leave it out; weights come from model.weights",
            )
        refuse_sources(value)


def refuse_pickles(source: str) -> None:
    """Raise EnvironmentFault where a checkpoint has no safetensors, but pickles."""
    if any(file_of(source, name) for name in ("model.safetensors", "model.safetensors.index.json")):
        return
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if path := file_of(source, name):
            raise pickled(path, Path(source) / "model.safetensors" if Path(source).is_dir() else None)


def file_of(source: str, name: str) -> Path | None:
    """A file of a local folder or a repository of the hub, if it is there, or the hub does not answer."""
    from transformers.utils import cached_file

    with explained(TRANSFORMERS + source), quiet():
        found = cached_file(
            repository_of(source),
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **revision_of(source),
        )
    return Path(found) if found else None


def has_file(source: str, name: str) -> bool:
    """Whether a folder or repository has a file. Raises EnvironmentFault where the hub does not answer, and nobody knows."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, revision = repository_of(source), revision_of(source).get("revision")
    if Path(repository).is_dir():
        return (Path(repository) / name).is_file()
    cached = try_to_load_from_cache(repository, name, revision=revision)
    if isinstance(cached, str):
        return True
    with explained(TRANSFORMERS + source), quiet():
        try:
            hf_hub_download(repository, name, revision=revision)
        except LocalEntryNotFoundError:
            if cached is None:
                raise
            return False  # the cache has a note that there is none
        except EntryNotFoundError:
            return False
    return True


def is_class(source: str) -> bool:
    """Whether this is the name of a class, and not of a folder or repository."""
    return "/" not in source


def repository_of(source: str) -> str:
    """OWNER/NAME, or the folder."""
    return source if Path(source).is_absolute() else source.partition("@")[0]


def revision_of(source: str) -> dict[str, str]:
    """What follows OWNER/NAME@, as an argument of the hub client; a folder may have an @ in its path."""
    revision = "" if Path(source).is_absolute() else source.partition("@")[2]
    return {"revision": revision} if revision else {}


@contextmanager
def explained(name: str) -> Iterator[None]:
    """transformers and the hub client raise many kinds; each means: these names, weights or arguments do not work."""
    try:
        yield
    except LpvitError:
        raise
    except Exception as error:
        reason = _reason(error)
        if isinstance(error, OSError):
            raise EnvironmentFault(
                f"model.name: cannot get {name!r} ({reason})",
                "connect to the hub once, or give a folder: --set model.name=transformers:/path/to/folder",
            ) from error
        raise UsageError(
            f"model.kwargs: transformers cannot build {name!r} ({reason})", "correct model.name and model.kwargs"
        ) from error


def _reason(error: Exception) -> str:
    """The line that says what is wrong; a validation error says it in its last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no details"]
    return f"{type(error).__name__}: {lines[-1 if lines[0].startswith('Validation error') else 0][:200]}"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no report of what was loaded, no list of retries: what does not fit is an error of ours."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        with quiet_hub():
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


@contextmanager
def quiet_hub() -> Iterator[None]:
    """The hub client does not tell of every retry."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def without_waiting() -> Iterator[bool]:
    """Whether the hub answers within three seconds; where it does not, only its cache is asked inside, and nothing retried."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            get_session().head(constants.ENDPOINT, timeout=3)
    except Exception:  # of whatever kind: it does not answer
        constants.HF_HUB_OFFLINE = True
    try:
        with quiet_hub():
            yield not constants.HF_HUB_OFFLINE
    finally:
        constants.HF_HUB_OFFLINE = before
