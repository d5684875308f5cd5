"""What all export formats share: their source, and the checks of what was written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpvit_cli.data import Batches
from lpvit_cli.errors import CheckFailed
from lpvit_cli.export.layer import Choice, Layer
from lpvit_cli.export.parity import agreement, relative_error, same_top1
from lpvit_cli.measure.accuracy import Accuracy
from lpvit_cli.measure.timing import Subject, time_in_visits, verdict
from lpvit_cli.models import VisionModel, build_model
from lpvit_cli.recipe import ModelSection, Recipe
from lpvit_cli.report.schema import BASELINE, ExportedFile, ExportedLayer, ExportSpeed, Parity
from lpvit_cli.run import Progress, Run
from lpvit_cli.stages.evaluate import measure_accuracy
from lpvit_cli.stages.tune import layer_tokens

BATCH_SIZES = (1, 2, 7)
VISITS, SAMPLES = 3, 4  # of each file that is timed
DENSE_FOLDER = ".dense"  # beside the files while they are made: what they are measured against
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "int8": 0.2, "int8-static": 0.2}


@dataclass(frozen=True)
class Source:
    """What is exported, and the images it is checked on."""

    recipe: Recipe
    run: Run
    folder: Path
    config: dict[str, Any]  # of the model folder
    original: VisionModel  # what files are compared with
    model: VisionModel  # what is written: the original, trimmed
    validation: Batches
    accuracy: Accuracy  # of the model before
    notes: list[str] = field(default_factory=list)
    files: list[ExportedFile] = field(default_factory=list)  # written so far

    @property
    def tolerance(self) -> float:
        return self.recipe.export.tolerance or TOLERANCES[self.recipe.export.precision]

    @property
    def threads(self) -> int:
        return self.recipe.export.threads or os.cpu_count() or 1

    @property
    def images(self) -> Tensor:
        """A batch [export.batch_size, 3, H, W] of random numbers, to be timed on."""
        size = (self.recipe.export.batch_size, *self.model.pretrained_cfg["input_size"])
        return torch.randn(size, generator=torch.Generator().manual_seed(0))

    def tokens(self, layers: Iterable[str]) -> dict[str, int]:
        """Rows of x that such a batch gives each layer."""
        return {name: self.recipe.export.batch_size * rows for name, rows in layer_tokens(self.model, layers).items()}

    def dense(self) -> VisionModel:
        """The architecture with random weights, to measure against: a dense model takes as long whatever it holds."""
        return build_model(ModelSection(name=self.config["architecture"], kwargs=self.config["kwargs"]))


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
            logits, reference = exported(batch), source.original(batch)
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


def measure(
    source: Source,
    runtime: str,
    file: str,
    open_dense: Callable[[], Subject],
    open_file: Callable[[], Subject],
    progress: Progress,
) -> ExportSpeed:
    """The file against the dense model in the same runtime, in turn, one alive at a time."""
    timing = time_in_visits(
        {BASELINE: open_dense, file: open_file},
        visits=VISITS,
        samples=SAMPLES,
        threads=source.threads,
        on_visit=lambda done, total: progress(f"timing {file}", done, total, f"{done}/{total}"),
    )
    ratio = timing.ratio(BASELINE, file)
    return ExportSpeed(
        threads=source.threads,
        batch_size=source.recipe.export.batch_size,
        timing=timing,
        speedup=ratio,
        verdict=verdict(file, f"dense float32 in {runtime}", ratio, timing, timing.subjects[file]),
    )


def describe(layers: Mapping[str, Layer], choices: Mapping[str, Choice]) -> list[ExportedLayer]:
    """How each layer was written."""
    return [
        ExportedLayer(
            name=name,
            shape=layer.weight.shape,
            block=layer.weight.block,
            density=layer.weight.density,
            form=choices[name].form,
            times_us=choices[name].times_us,
        )
        for name, layer in layers.items()
    ]


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
