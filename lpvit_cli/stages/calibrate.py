"""calibrate: one pass of the dense model over calibration images -> RUN/calibration/statistics.safetensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lpvit_cli import distributed
from lpvit_cli.curvature import LayerStatistics, collect, save_statistics
from lpvit_cli.data.batches import Batches
from lpvit_cli.data.splits import calibration_batches
from lpvit_cli.devices import describe_device, fast_dtype
from lpvit_cli.models.build import build_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.merging import merge_tokens, merging_for
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.pipeline.run import Run
from lpvit_cli.progress import Progress
from lpvit_cli.pruning.plan import Plan
from lpvit_cli.pruning.planning import plan_of
from lpvit_cli.pruning.splitting import split
from lpvit_cli.recipe import Recipe
from lpvit_cli.report.schema import CalibrateReport
from lpvit_cli.stages import profile_of
from lpvit_cli.tasks.evaluation import gradient_for, task_of

STATISTICS = "statistics.safetensors"


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> CalibrateReport:
    torch.manual_seed(recipe.seed)
    model, told = build_model(recipe.model, recipe.task, recipe.features), list[str]()
    if recipe.splits:
        found = _gathered(recipe, run, model, progress)[0]
        merging, *told = split(model, recipe.prune.budget, planner(recipe, run, model, found, progress), progress)
    else:
        merging = merging_for(model, recipe.tokens) if recipe.tokens else None
    model = merge_tokens(model, merging)
    statistics, images, gradient = _gathered(recipe, run, model, progress)
    save_statistics(work / STATISTICS, statistics, prunable_layers(model, recipe.prune.layers))
    return CalibrateReport(
        device=describe_device(run.device),
        notes=[*images.notes(), *told],
        images=next(iter(statistics.values())).images,
        gradient=gradient if task_of(model).uses_gradient else "random direction",
        layers=len(statistics),
        statistics_bytes=(work / STATISTICS).stat().st_size,
        merging=merging,
    )


def _gathered(
    recipe: Recipe, run: Run, model: VisionModel, progress: Progress
) -> tuple[dict[str, LayerStatistics], Batches, str]:
    """The statistics of a model's prunable layers, the images they are of, and the kind of loss."""
    images, task = calibration_batches(recipe.data, recipe.calibrate, recipe.seed, model), task_of(model)
    gradient = gradient_for(task, recipe.calibrate, images)
    statistics = collect(
        model,
        prunable_layers(model, recipe.prune.layers),
        images,
        task.loss(gradient, recipe.seed + distributed.rank()),
        run.device,
        lambda done: progress("calibrating", done, images.share, f"{done}/{images.share} images"),
        fast_dtype(recipe.dtype, run.device),
        recipe.prune.height,
    )
    return statistics, images, gradient


def planner(
    recipe: Recipe, run: Run, dense: VisionModel, statistics: dict[str, LayerStatistics], progress: Progress
) -> Callable[[VisionModel], Plan]:
    """Makes the plan of the dense model, or of a copy of it that merges tokens."""
    return partial(
        plan_of,
        prune=recipe.prune,
        data=recipe.data,
        calibrate=recipe.calibrate,
        seed=recipe.seed,
        dense=dense,
        statistics=statistics,
        device=run.device,
        dtype=fast_dtype(recipe.dtype, run.device),
        profile=profile_of(run),
        progress=progress,
    )
