"""prune --dry-run: what a pruning would give, from the calibration alone."""

from __future__ import annotations

from lpvit_cli.devices import describe_device
from lpvit_cli.measure.profile import PROFILE_FILE, DeviceProfile
from lpvit_cli.models.build import build_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.pipeline.run import Run
from lpvit_cli.progress import Progress
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.prune import Budget
from lpvit_cli.report.layers import layer_reports
from lpvit_cli.report.schema import PredictedPoint, PredictionReport
from lpvit_cli.stages import CALIBRATE, PROFILE, PRUNE
from lpvit_cli.stages.prune import make_plan


def predict(recipe: Recipe, run: Run, progress: Progress) -> PredictionReport:
    """What prune, or its sweep, would give, from the calibration alone: no weight is touched, nothing is evaluated."""
    kind = recipe.prune.budget.kind
    reasons = []
    if recipe.prune.budget.is_searched:
        reasons.append(f"{kind}: finding the model takes evaluating some; give a flops budget to predict")
    if run.changes(CALIBRATE) != []:
        random = recipe.model.model_copy(update={"pretrained": False, "weights": None})
        sketch = build_model(random, recipe.task, recipe.features)
        prunable_layers(sketch, recipe.prune.layers)  # a glob that matches nothing is not worth a calibration
        reasons.append(f"this recipe is not calibrated yet: {run.command(CALIBRATE)}")
    if PROFILE in run.sources(PRUNE) and run.changes(PROFILE) != []:
        reasons.append(f"{kind}: no device profile: {run.command(PROFILE)}")
    if reasons:
        return PredictionReport(device=describe_device(run.device), kind=kind, points=[], reasons=reasons)
    plan = make_plan(recipe, run, progress).plan
    if plan.profile is None and run.changes(PROFILE) == []:
        plan.take(DeviceProfile.load(run.artefact(PROFILE) / PROFILE_FILE))
    if plan.profile is None:
        reasons.append(f"latency: no device profile: {run.command(PROFILE)}")
    points = []
    for value in recipe.sweep or (recipe.prune.budget.value,):
        allocation = plan.allocation(Budget.model_validate({kind: value}))
        predicted = plan.predict(allocation)
        points.append(
            PredictedPoint(
                budget=value,
                kept_fraction=predicted.kept_fraction,
                kept_by_layer={layer.name: layer.kept_fraction for layer in layer_reports(allocation)},
                flops=predicted.flops,
                bytes=predicted.bytes,
                energy_uj=predicted.energy_uj,
                latency_ms=predicted.latency_ms,
            )
        )
    return PredictionReport(
        device=plan.profile.device if plan.profile else describe_device(run.device),
        kind=kind,
        flops_dense=plan.flops_dense,
        bytes_dense=plan.bytes_dense,
        energy_uj_dense=plan.energy_uj_dense,
        latency_ms_dense=plan.latency_ms_dense,
        points=points,
        reasons=reasons,
    )
