"""What all export formats share: their source, and the checks of what was written."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpvit_cli.data import Batches
from lpvit_cli.errors import CheckFailed
from lpvit_cli.export.parity import agreement, relative_error, same_top1
from lpvit_cli.measure.accuracy import Accuracy
from lpvit_cli.models import VisionModel
from lpvit_cli.recipe import Recipe
from lpvit_cli.report.schema import ExportedFile, Parity
from lpvit_cli.run import Progress, Run
from lpvit_cli.stages.evaluate import measure_accuracy

BATCH_SIZES = (1, 2, 7)
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "int8": 0.2, "int8-static": 0.2}


@dataclass(frozen=True)
class Source:
    """What is exported, and the images it is checked on."""

    recipe: Recipe
    run: Run
    folder: Path
    config: dict[str, Any]  # of the model folder
    model: VisionModel  # trimmed
    validation: Batches
    accuracy: Accuracy  # of the model before
    notes: list[str] = field(default_factory=list)
    files: list[ExportedFile] = field(default_factory=list)  # written so far

    @property
    def tolerance(self) -> float:
        return self.recipe.export.tolerance or TOLERANCES[self.recipe.export.precision]


def link(file: Path, target: Path) -> None:
    """The same content in a second place, on the disk only once where the file system can do that."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def check(exported: VisionModel, source: Source, file: str, progress: Progress) -> tuple[list[Parity], Accuracy]:
    """`exported` against the model on real images, and its accuracy. Raises CheckFailed where they differ too much."""
    parity = []
    with torch.inference_mode():
        for batch in first_images(source.validation, sum(BATCH_SIZES)).split(BATCH_SIZES):
            logits, reference = exported(batch), source.model(batch)
            result = Parity(
                batch_size=len(batch),
                relative_error=relative_error(logits, reference),
                agreement=same_top1(logits, reference),
                agreement_but_ties=agreement(logits, reference, source.tolerance),
            )
            require_parity(result, source.tolerance, file)
            parity.append(result)
    cpu = torch.device("cpu")
    accuracy = measure_accuracy(exported, source.validation, cpu, torch.float32, progress, "evaluating the exported file")
    if accuracy.top1 < source.accuracy.top1 - source.recipe.export.max_drop:
        raise CheckFailed(
            f"export: {file} has {accuracy.top1:.2f} % top-1, the model {source.accuracy.top1:.2f} %: more than "
            f"export.max_drop = {source.recipe.export.max_drop:g} points are lost",
            "another export.precision keeps more (int8-static, float32); nothing was written",
        )
    return parity, accuracy


def first_images(batches: object, count: int) -> Tensor:
    """The first `count` images [count, 3, H, W], repeated where the split holds fewer."""
    images = torch.empty(0)
    for batch, _ in batches:  # type: ignore[attr-defined]
        images = torch.cat([images, batch]) if len(images) else batch
        if len(images) >= count:
            break
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]


def require_parity(result: Parity, tolerance: float, file: str) -> None:
    if not result.relative_error <= tolerance or result.agreement_but_ties < 1:
        raise CheckFailed(
            f"export: {file} disagrees with the model at batch {result.batch_size}: relative error "
            f"{result.relative_error:.1e} (at most {tolerance:g}), same top-1 for {result.agreement:.0%} of the images",
            "try export.form=dense, another export.opset or export.precision; nothing was written",
        )
