"""Anything lpvit can run, by its path or name: model folders, run folders, exported files, timm names."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.export.formats.base import Format
from lpvit_cli.models.build import build_model, family_of
from lpvit_cli.models.config_file import read_config, remembered_data
from lpvit_cli.models.families.timm import HUB
from lpvit_cli.models.folder import load_model
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.registry import FORMATS

LATEST = ("gradual", "finetuned", "pruned")  # folders of a run that hold a model, the one that came last first


def readers() -> dict[str, Format]:
    """The formats whose files can be run, by ending; without those of another package that do not load."""
    by_ending: dict[str, Format] = {}
    for name in FORMATS.names():
        with suppress(EnvironmentFault):
            one = FORMATS.get(name)()
            if one.suffix:
                by_ending.setdefault(one.suffix, one)
    return by_ending


def open_model(name: str) -> tuple[VisionModel, dict[str, Any]]:
    """A model folder, a run folder (its latest model), a file that export wrote, or a name as in a recipe, with pretrained
    weights; and its data section."""
    path, endings = Path(name), readers()
    if not (path / "config.json").is_file():  # what export wrote, if it is that
        path = next((file for suffix in endings for file in sorted(path.glob(f"model*{suffix}"))), path)
    if path.is_file():
        if path.suffix not in endings:
            raise UsageError(
                f"{path}: not a model lpvit can run",
                "give a model folder, a .onnx, .pt2 or .xml file written by lpvit, or a timm name",
            )
        exported = endings[path.suffix].open(path)
        return exported, remembered_data(exported.config)
    if path.is_dir():
        if not (path / "config.json").is_file():
            path = next((path / folder for folder in LATEST if (path / folder / "config.json").is_file()), path)
        return load_model(path), remembered_data(read_config(path))
    prefixed = name.startswith(HUB) or family_of(name) != "timm"
    if path.suffix in endings or (len(path.parts) > 1 and not prefixed):
        raise UsageError(
            f"{name}: no such model folder or file", "runs/NAME/pruned, runs/NAME/export/model.onnx, or a timm name"
        )
    return build_model(ModelSection(name=name, pretrained=family_of(name) != "module")), {}
