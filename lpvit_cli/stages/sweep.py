"""prune --sweep: one calibration, many budgets -> RUN/sweep/<budget>/, model folders, with a table and a picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lpvit_cli.errors import UsageError
from lpvit_cli.recipe import Budget, Recipe
from lpvit_cli.report.pictures import sweep_picture
from lpvit_cli.report.schema import SweepPoint, SweepReport
from lpvit_cli.run import Progress, Run, replace_text
from lpvit_cli.stages.prune import make_plan, prune_to, search


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> SweepReport:
    if not recipe.sweep:
        raise UsageError("sweep: no budgets given", "for example: lpvit prune RECIPE --sweep 0.3,0.5,0.7")
    plan = make_plan(recipe, run, progress)
    dense = plan.evaluate(plan.model, progress, "evaluating the dense model")
    kind = recipe.prune.budget.kind
    points = []
    for value in recipe.sweep:
        budget = Budget.model_validate({kind: value})
        if budget.max_drop is not None:
            budget = search(plan, dense.top1 - budget.max_drop, progress)
        folder = work / f"{value:g}"
        report = prune_to(plan, budget, dense, folder, progress)
        replace_text(folder / "report.json", report.model_dump_json(indent=1))
        points.append(SweepPoint(budget=value, folder=folder.name, report=report))
    result = SweepReport(device=points[0].report.device, notes=points[0].report.notes, kind=kind, points=points)
    if find_spec("matplotlib"):
        replace_text(work / "sweep.svg", sweep_picture(result))
    return result
