"""calibrate: one pass of the dense model over calibration images -> RUN/calibration/statistics.safetensors."""

from __future__ import annotations

from pathlib import Path

import torch

from lpvit_cli import distributed
from lpvit_cli.curvature import collect, save_statistics
from lpvit_cli.data.splits import calibration_batches
from lpvit_cli.devices import describe_device, fast_dtype
from lpvit_cli.models.build import build_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.pipeline.run import Run
from lpvit_cli.progress import Progress
from lpvit_cli.recipe import Recipe
from lpvit_cli.report.schema import CalibrateReport
from lpvit_cli.tasks.evaluation import gradient_for, task_of

STATISTICS = "statistics.safetensors"


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> CalibrateReport:
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, recipe.task, recipe.features)
    layers = prunable_layers(model, recipe.prune.layers)
    task, images = task_of(model), calibration_batches(recipe.data, recipe.calibrate, recipe.seed, model)
    gradient = gradient_for(task, recipe.calibrate, images)
    statistics = collect(
        model,
        layers,
        images,
        task.loss(gradient, recipe.seed + distributed.rank()),
        run.device,
        lambda done: progress("calibrating", done, images.share, f"{done}/{images.share} images"),
        fast_dtype(recipe.dtype, run.device),
        recipe.prune.height,
    )
    save_statistics(work / STATISTICS, statistics, layers)
    return CalibrateReport(
        device=describe_device(run.device),
        notes=images.notes(),
        images=next(iter(statistics.values())).images,
        gradient=gradient if task.uses_gradient else "random direction",
        layers=len(layers),
        statistics_bytes=(work / STATISTICS).stat().st_size,
    )
