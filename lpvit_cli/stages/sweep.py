"""prune --sweep: one calibration, many budgets -> RUN/sweep/<budget>/, model folders, with a table and a picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from lpvit_cli.bench.models import time_models
from lpvit_cli.devices import pick_dtype
from lpvit_cli.errors import UsageError
from lpvit_cli.files import replace_text
from lpvit_cli.models.folder import load_model
from lpvit_cli.pipeline.run import Run
from lpvit_cli.progress import Progress
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.prune import Budget
from lpvit_cli.report.pictures import sweep_picture
from lpvit_cli.report.schema import DENSE, SweepPoint, SweepReport
from lpvit_cli.stages.prune import make_plan


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> SweepReport:
    if not recipe.sweep:
        raise UsageError("sweep: no budgets given", "for example: lpvit prune RECIPE --sweep 0.3,0.5,0.7")
    pruner = make_plan(recipe, run, progress)
    folders = {f"{value:g}": Budget.model_validate({recipe.prune.budget.kind: value}) for value in recipe.sweep}
    reports = pruner.prune_each([(budget, work / folder) for folder, budget in folders.items()])
    for folder, report in zip(folders, reports, strict=True):
        replace_text(work / folder / "report.json", report.model_dump_json(indent=1))
    models = {DENSE: pruner.model} | {folder: load_model(work / folder) for folder in folders}
    device, generator = run.target_device, torch.Generator().manual_seed(recipe.seed)
    images = torch.randn(recipe.target.batch_size, *pruner.model.pretrained_cfg["input_size"], generator=generator)
    timing = time_models(
        models,
        DENSE,
        images.to(device, pick_dtype(recipe.target_dtypes[0], device)),
        threads=recipe.target.threads,
        rounds=recipe.bench.rounds,
        warmup_seconds=recipe.bench.warmup_seconds,
        progress=progress,
    )
    points = [
        SweepPoint(budget=budget.value, folder=folder, report=report, latency_ms=subject.median_ms, speedup=speedup)
        for (folder, budget), report in zip(folders.items(), reports, strict=True)
        for subject, speedup in [(timing.subjects[folder], timing.ratio(DENSE, folder))]
    ]
    busy = ["other processes used the machine while the speed was measured: it is doubtful"] if timing.busy else []
    result = SweepReport(
        device=points[0].report.device,
        notes=points[0].report.notes + busy,
        kind=recipe.prune.budget.kind,
        batch_size=recipe.target.batch_size,
        latency_ms_dense=timing.subjects[DENSE].median_ms,
        points=points,
    )
    if find_spec("matplotlib"):
        replace_text(work / "sweep.svg", sweep_picture(result))
    return result
