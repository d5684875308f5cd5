"""prune: curves, allocation, masks, compensated weights -> RUN/pruned/, a model folder with packed weights."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from lpvit_cli.errors import UsageError
from lpvit_cli.measure.accuracy import Accuracy
from lpvit_cli.measure.profile import DeviceProfile
from lpvit_cli.models import build_model, describe_device, device_of, model_config, prunable_layers, save_model
from lpvit_cli.pruning.blocks import Block
from lpvit_cli.pruning.cost import LayerCost
from lpvit_cli.recipe import Budget, Recipe
from lpvit_cli.report.schema import LayerReport, PredictedPoint, PredictionReport, PruneReport
from lpvit_cli.run import Progress, Run
from lpvit_cli.stages import CALIBRATE, PROFILE, PRUNE
from lpvit_cli.stages.plan import Plan, Pruned, make_plan
from lpvit_cli.stages.profile import PROFILE_FILE
from lpvit_cli.stages.pruned_model import images_in_sequence, prune_model

SEARCH_STEP = 0.01  # of the FLOPs: how finely the search for an accuracy looks


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> PruneReport:
    plan = make_plan(recipe, run, progress)
    dense = plan.evaluate(plan.model, progress, "evaluating the dense model")
    budget = recipe.prune.budget
    if budget.max_drop is not None:
        budget = search(plan, dense.top1 - budget.max_drop, progress)
    return prune_to(plan, budget, dense, work, progress)


def prune_to(plan: Plan, budget: Budget, dense: Accuracy, work: Path, progress: Progress) -> PruneReport:
    """Prune to a budget, evaluate, and write the model folder `work`."""
    recipe, settings = plan.recipe, plan.settings
    model, pruned = prune_model(plan, budget, progress)
    accuracy = plan.evaluate(model, progress, "evaluating the pruned model")
    data = {"dataset": recipe.data.dataset, "root": str(recipe.data.root or ""), "split": recipe.data.val_split}
    save_model(work, model, model_config(recipe.model, model, data=data, parent=recipe.model.model_dump(mode="json")))
    predicted = plan.predict(pruned)
    return PruneReport(
        device=describe_device(device_of(recipe)),
        notes=_notes(plan),
        method=settings.method,
        beta=pruned.beta,
        layers=layer_reports(plan, pruned),
        flops_dense=plan.flops.total,
        flops=predicted.flops,
        linear_kept_fraction=predicted.kept_fraction,
        bytes_dense=plan.bytes_dense,
        bytes=sum(path.stat().st_size for path in work.iterdir()),
        latency_ms_dense=plan.profile.model_ms if plan.profile else None,
        latency_ms=predicted.latency_ms,
        accuracy_dense=dense,
        accuracy=accuracy,
        skipped_images=len(plan.skipped),
    )


def predict(recipe: Recipe, run: Run, progress: Progress) -> PredictionReport:
    """What prune, or its sweep, would give, from the calibration alone: no weight is touched, nothing is evaluated."""
    kind = recipe.prune.budget.kind
    reasons = []
    if kind == "max_drop":
        reasons.append("max_drop: finding the model takes evaluating some; give a flops budget to predict")
    if run.changes(CALIBRATE) != []:
        sketch = build_model(recipe.model.model_copy(update={"pretrained": False, "weights": None}))
        prunable_layers(sketch, recipe.prune.layers)  # a glob that matches nothing is not worth a calibration
        reasons.append(f"this recipe is not calibrated yet: {run.command(CALIBRATE)}")
    if PROFILE in run.sources(PRUNE) and run.changes(PROFILE) != []:
        reasons.append(f"{kind}: no device profile: {run.command(PROFILE)}")
    if reasons:
        return PredictionReport(device=describe_device(device_of(recipe)), kind=kind, points=[], reasons=reasons)
    plan = make_plan(recipe, run, progress)
    if plan.profile is None and run.changes(PROFILE) == []:
        plan.profile = DeviceProfile.load(run.artefact(PROFILE) / PROFILE_FILE)
    if plan.profile is None:
        reasons.append(f"latency: no device profile: {run.command(PROFILE)}")
    points = []
    for value in recipe.sweep or (recipe.prune.budget.value,):
        pruned = plan.allocation(Budget.model_validate({kind: value}))
        predicted = plan.predict(pruned)
        points.append(
            PredictedPoint(
                budget=value,
                kept_fraction=predicted.kept_fraction,
                kept_by_layer={layer.name: layer.kept_fraction for layer in layer_reports(plan, pruned)},
                flops=predicted.flops,
                bytes=predicted.bytes,
                energy_uj=predicted.energy_uj,
                latency_ms=predicted.latency_ms,
            )
        )
    return PredictionReport(
        device=plan.profile.device if plan.profile else describe_device(device_of(recipe)),
        kind=kind,
        flops_dense=plan.flops.total,
        bytes_dense=plan.bytes_dense,
        energy_uj_dense=plan.energy_uj_dense,
        latency_ms_dense=plan.profile.model_ms if plan.profile else None,
        points=points,
        reasons=reasons,
    )


def search(plan: Plan, least_top1: float, progress: Progress) -> Budget:
    """The lowest FLOPs budget whose one-shot model still has `least_top1` %, by bisection to a hundredth of the FLOPs.

    Raises UsageError when not even the largest budget below dense reaches it.
    """
    lowest = plan.reachable(Budget(flops=1))
    low, high = math.ceil(lowest / SEARCH_STEP - 1e-9), round(1 / SEARCH_STEP)  # high holds: it is the dense model
    while high - low > 0:
        middle = (low + high) // 2
        budget = Budget(flops=middle * SEARCH_STEP)
        model, _ = prune_model(plan, budget, progress)
        top1 = plan.evaluate(model, progress, f"evaluating at {middle * SEARCH_STEP:.0%} of the FLOPs").top1
        low, high = (low, middle) if top1 >= least_top1 else (middle + 1, high)
    if high * SEARCH_STEP >= 1:
        raise UsageError(
            f"prune.budget: no pruned model keeps a top-1 of {least_top1:.2f} % without recovery",
            "allow a larger max_drop, or give a flops budget and let finetune-lora-ga recover",
        )
    return Budget(flops=high * SEARCH_STEP)


def layer_reports(plan: Plan, pruned: Pruned) -> list[LayerReport]:
    """One for each prunable layer; the two of a pair share their distortion."""
    masks, made = pruned.masks or pruned.planned_masks(), {}
    for name, part in pruned.parts.items():
        block = pruned.option(name).block
        for layer, mask in part.masks(name, masks[name]).items():
            cost = part.costs[block][layer]
            shape = block if layer == name else (part.pair.width, cost.shape[1]) if part.pair else block
            made[layer] = _layer_report(plan, layer, shape, mask, pruned.distortion(name), cost)
    return [made[layer] for layer in plan.layers]


def _layer_report(plan: Plan, name: str, block: Block, mask: Tensor, distortion: float, cost: LayerCost) -> LayerReport:
    whole = torch.ones_like(mask)
    return LayerReport(
        name=name,
        shape=cost.shape,
        block=block,
        blocks=mask.numel(),
        kept_blocks=int(mask.sum()),
        kept_map=["".join("#" if kept else "." for kept in row) for row in mask.tolist()],
        distortion=distortion,
        flops_dense=int(cost.flops.sum()),
        flops=int(cost.flops[mask].sum()),
        energy_uj_dense=plan.energy_uj(name, block, whole, cost),
        energy_uj=plan.energy_uj(name, block, mask, cost),
    )


def _notes(plan: Plan) -> list[str]:
    notes = []
    if plan.skipped:
        notes.append(f"{len(plan.skipped)} unreadable images skipped (first: {plan.skipped[0]})")
    seen = {name: layer for name, layer in plan.statistics.items() if layer.tokens < len(layer.input_outer)}
    if seen and plan.by_obs:
        name, layer = max(seen.items(), key=lambda item: len(item[1].input_outer) / item[1].tokens)
        notes.append(
            f"calibration saw {layer.tokens} tokens of {name}, fewer than its {len(layer.input_outer)} inputs "
            f"({len(seen)} such layers): raise calibrate.images"
        )
    if plan.gradients and len(plan.gradients.images) < plan.settings.fisher_images:
        asked, found = plan.settings.fisher_images, len(plan.gradients.images)
        notes.append(f"gradients of {found} images, fewer than the {asked} of prune.fisher_images: raise calibrate.images")
    images, used = next(iter(plan.statistics.values())).images, images_in_sequence(plan)
    if plan.by_obs and plan.settings.sequential and used < images:
        notes.append(f"pruned in sequence on {used} of the {images} calibration images: no more fit into memory at once")
    if plan.energy_profile is not None:
        notes.append(f"energy is predicted by the profile of {plan.energy_profile.device}: {plan.energy_profile.energy_source}")
    elif len({plan.flops.tokens[name] for name in plan.layers}) == 1:
        notes.append(
            "every layer sees the same number of tokens, so a block costs the same power everywhere: beta changes nothing"
        )
    return notes
