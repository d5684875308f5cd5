"""Which model a `model.name` means today: its files may change while the name stays."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lpvit_cli.files import content_id, digest
from lpvit_cli.machine import installed
from lpvit_cli.recipe.model import MODULE, TRANSFORMERS


def model_content(name: str, content_of: Callable[[Path], str | None] = content_id) -> dict[str, Any]:
    """What a model depends on besides its name, weights and arguments; empty for models of timm. Imports and runs nothing.

    Of a checkpoint in a folder its files, of your own module the source of its package.
    """
    if name.startswith(TRANSFORMERS):
        folder = Path(name.removeprefix(TRANSFORMERS))
        files = [*folder.glob("*.json"), *folder.glob("*.safetensors")] if folder.is_absolute() else []
        return {"version of transformers": installed("transformers")} | _contents(files, content_of)
    if name.startswith(MODULE):
        return _contents(_sources(name.removeprefix(MODULE).partition(":")[0].partition(".")[0]), content_of)
    return {}


def _sources(package: str) -> list[Path]:
    """The Python files of a top-level package or module. (Looking for a module inside a package would import the package.)"""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [path for folder in spec.submodule_search_locations for path in Path(folder).rglob("*.py")]
    return [Path(spec.origin)] if spec.has_location and spec.origin else []


def _contents(files: list[Path], content_of: Callable[[Path], str | None]) -> dict[str, Any]:
    return {"content": digest([[str(path), content_of(path)] for path in sorted(files)])} if files else {}
