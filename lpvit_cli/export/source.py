"""What is exported, how, and the images it is checked on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpvit_cli.data.batches import Batches
from lpvit_cli.export.results import ExportedFile
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.recipe.export import ExportSection
from lpvit_cli.sparse import layer_tokens
from lpvit_cli.tasks.evaluation import Validation

TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "int8": 0.2, "int8-static": 0.2}
DENSE_FOLDER = ".dense"  # beside the files while they are made: what they are measured against


@dataclass(frozen=True)
class Publication:
    """What a model card tells besides the file: the recipe and the reports of its stages."""

    recipe: Any
    pruned: Any
    finetuned: Any | None
    bench: Any | None  # None: nothing was measured, or another model than the one that is exported


@dataclass(frozen=True)
class Source:
    """A model to be exported. `original` is what files are compared with, `model` what is written: the original, trimmed."""

    name: str
    settings: ExportSection
    precision: str
    threads: int
    asked_threads: int | None  # None: nobody said how many
    batch_size: int  # that forms and files are timed on
    folder: Path  # of the model
    config: dict[str, Any]  # of the model folder, but for paths of this machine: files travel
    original: Any
    model: Any
    validation: Validation  # on the CPU
    quality: Any  # of the model before
    quality_dense: Any
    prunable: Callable[[str], bool]  # whether a layer of this name could have been pruned
    calibration: Callable[[], Batches]
    dense: Callable[[], VisionModel]  # the dense architecture: what it holds does not change how long it takes
    trained: Callable[[], VisionModel]  # the dense model; raises LpvitError where its weights are not to be had here
    publication: Callable[[], Publication]
    notes: list[str] = field(default_factory=list)
    notes_by_format: dict[str, list[str]] = field(default_factory=dict)
    files: list[ExportedFile] = field(default_factory=list)  # written so far
    qualities: dict[str, Any] = field(default_factory=dict)  # of free forms of the dense model, by name; None: not known

    @property
    def tolerance(self) -> float:
        return self.settings.tolerance or TOLERANCES[self.precision]

    def least_score(self, quality: Any) -> float:
        """What a file's quality must reach, in points, where `quality` is what it had before."""
        return float(quality.score[0]) - self.settings.max_drop

    @property
    def images(self) -> Tensor:
        """A batch [batch_size, C, H, W] of random numbers, to be timed on."""
        size = (self.batch_size, *self.model.pretrained_cfg["input_size"])
        return torch.randn(size, generator=torch.Generator().manual_seed(0))

    def tokens(self, layers: Iterable[str]) -> dict[str, int]:
        """Rows of x that such a batch gives each layer."""
        return {name: self.batch_size * rows for name, rows in layer_tokens(self.model, layers).items()}

    def file(self, format_: str) -> ExportedFile | None:
        """What was written in another format."""
        return next((file for file in self.files if file.format == format_), None)


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """A model folder's config.json without the paths of this machine: neither where the images lie nor the parent."""
    public = {key: value for key, value in config.items() if key != "parent"}
    if public.get("data"):
        public["data"] = {key: value for key, value in public["data"].items() if key != "root"}
    return public


def link(file: Path, target: Path) -> None:
    """The same content in a second place, on the disk only once where the file system can do that."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
