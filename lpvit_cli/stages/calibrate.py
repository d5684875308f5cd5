"""calibrate: one pass of the dense model over calibration images -> RUN/calibration/statistics.safetensors."""

from __future__ import annotations

from pathlib import Path

import torch

from lpvit_cli.curvature import collect, save_statistics
from lpvit_cli.data import Batches, batches, open_images
from lpvit_cli.models import VisionModel, build_model, describe_device, device_of, prunable_layers
from lpvit_cli.recipe import Recipe
from lpvit_cli.report.schema import CalibrateReport
from lpvit_cli.run import Progress, Run

STATISTICS = "statistics.safetensors"


def calibration_batches(recipe: Recipe, model: VisionModel) -> Batches:
    """The same images every time, for the same recipe."""
    source = open_images(recipe.data, recipe.data.train_split, model)
    settings = recipe.calibrate
    return batches(
        model, source, recipe.data, batch_size=settings.batch_size, shuffle=True, seed=recipe.seed, limit=settings.images
    )


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> CalibrateReport:
    torch.manual_seed(recipe.seed)
    device = device_of(recipe)
    model = build_model(recipe.model)
    layers = prunable_layers(model, recipe.prune.layers)
    images = calibration_batches(recipe, model)
    total = images.share
    statistics = collect(
        model,
        layers,
        images,
        recipe.calibrate.gradient,
        recipe.seed,
        device,
        lambda done: progress("calibrating", done, total, f"{done}/{total} images"),
    )
    save_statistics(work / STATISTICS, statistics)
    used = next(iter(statistics.values())).images
    notes = []
    if used < recipe.calibrate.images and not images.skipped:
        notes.append(f"{used} calibration images, fewer than the {recipe.calibrate.images} asked for: the split holds no more")
    if images.skipped:
        notes.append(f"{len(images.skipped)} unreadable images skipped (first: {images.skipped[0]})")
    return CalibrateReport(
        device=describe_device(device),
        notes=notes,
        images=used,
        gradient=recipe.calibrate.gradient,
        layers=len(layers),
        statistics_bytes=(work / STATISTICS).stat().st_size,
    )
