"""prune --sweep: one calibration, many budgets -> RUN/sweep/<budget>/, model folders, with a table and a picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from lpvit_cli.errors import UsageError
from lpvit_cli.measure.timing import TimingRun, cpu_threads, time_interleaved
from lpvit_cli.models import bench_dtypes, device_of, load_model
from lpvit_cli.recipe import Budget, Recipe
from lpvit_cli.report.pictures import sweep_picture
from lpvit_cli.report.schema import BASELINE, PruneReport, SweepPoint, SweepReport
from lpvit_cli.run import Progress, Run, replace_text
from lpvit_cli.sparse import fuse, trim
from lpvit_cli.stages.plan import Plan, make_plan
from lpvit_cli.stages.prune import prune_to, search
from lpvit_cli.stages.subjects import forward_of
from lpvit_cli.stages.tune import tune_model


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> SweepReport:
    if not recipe.sweep:
        raise UsageError("sweep: no budgets given", "for example: lpvit prune RECIPE --sweep 0.3,0.5,0.7")
    plan = make_plan(recipe, run, progress)
    dense = plan.evaluate(plan.model, progress, "evaluating the dense model")
    kind = recipe.prune.budget.kind
    reports: dict[float, PruneReport] = {}
    for value in recipe.sweep:
        budget = Budget.model_validate({kind: value})
        if budget.max_drop is not None:
            budget = search(plan, dense.top1 - budget.max_drop, progress)
        folder = work / f"{value:g}"
        reports[value] = prune_to(plan, budget, dense, folder, progress)
        replace_text(folder / "report.json", reports[value].model_dump_json(indent=1))
    timing = _speed(plan, [work / f"{value:g}" for value in reports], progress)
    points = [
        SweepPoint(
            budget=value,
            folder=f"{value:g}",
            report=report,
            latency_ms=timing.subjects[f"{value:g}"].percentiles.p50,
            speedup=timing.ratio(BASELINE, f"{value:g}"),
        )
        for value, report in reports.items()
    ]
    first = points[0].report
    busy = ["other processes used the machine while the speed was measured: it is doubtful"] if timing.busy else []
    result = SweepReport(
        device=first.device,
        notes=first.notes + busy,
        kind=kind,
        batch_size=recipe.profile.batch_size,
        latency_ms_dense=timing.subjects[BASELINE].percentiles.p50,
        points=points,
    )
    if find_spec("matplotlib"):
        replace_text(work / "sweep.svg", sweep_picture(result))
    return result


def _speed(plan: Plan, folders: list[Path], progress: Progress) -> TimingRun:
    """All models of the sweep and the dense one, interleaved, on a batch of `profile.batch_size` random images."""
    recipe, device = plan.recipe, device_of(plan.recipe)
    dtype = bench_dtypes(recipe, device)[0]
    generator = torch.Generator().manual_seed(recipe.seed)
    size = (recipe.profile.batch_size, *plan.model.pretrained_cfg["input_size"])
    images = torch.randn(size, generator=generator).to(device, dtype)
    models = {BASELINE: plan.model} | {folder.name: fuse(trim(load_model(folder))) for folder in folders}
    with cpu_threads(recipe.bench.threads):
        for model in list(models.values())[1:]:
            tune_model(model.to(device, dtype), [recipe.profile.batch_size], ("forward",), progress, again=False)
        return time_interleaved(
            {name: forward_of(model.to(device, dtype), images) for name, model in models.items()},
            device=device,
            rounds=recipe.bench.rounds,
            warmup_seconds=recipe.bench.warmup_seconds,
            on_round=lambda done, total: progress("timing the sweep", done, total, f"round {done}/{total}"),
        )
