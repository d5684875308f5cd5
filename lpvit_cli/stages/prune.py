"""prune: curves, allocation under the budget, masks -> RUN/pruned/, a model folder with packed weights."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from lpvit_cli.curvature import LayerStatistics, load_statistics
from lpvit_cli.data import Batches, class_names
from lpvit_cli.models import (
    build_model,
    describe_device,
    device_of,
    model_config,
    prunable_layers,
    save_model,
)
from lpvit_cli.pruning.allocate import Curve, allocate, automatic_beta
from lpvit_cli.pruning.blocks import Block, require_fit
from lpvit_cli.pruning.cost import LayerCost, ModelFlops, count_flops, layer_cost
from lpvit_cli.pruning.saliency import METHODS, Removal
from lpvit_cli.pruning.surgeon import compensated
from lpvit_cli.recipe import PruneSection, Recipe
from lpvit_cli.report.schema import LayerReport, PruneReport
from lpvit_cli.run import Progress, Run
from lpvit_cli.sparse import sparsify
from lpvit_cli.stages import CALIBRATE
from lpvit_cli.stages.calibrate import STATISTICS
from lpvit_cli.stages.evaluate import evaluate_model, validation_batches


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> PruneReport:
    torch.manual_seed(recipe.seed)
    device, settings = device_of(recipe), recipe.prune
    model = build_model(recipe.model)
    layers = prunable_layers(model, settings.layers)
    for name, layer in layers.items():
        require_fit(name, (layer.out_features, layer.in_features), settings.block)
    validation = validation_batches(recipe, model)
    statistics = load_statistics(run.artefact(CALIBRATE) / STATISTICS, list(layers))

    flops = count_flops(model, layers)
    costs = {name: layer_cost(layer, flops.tokens[name], settings.block, settings.power) for name, layer in layers.items()}
    removals = remove_order(layers, statistics, settings, progress)
    curves = {name: _curve(removals[name], costs[name], settings) for name in layers}
    beta = automatic_beta(curves) if settings.beta == "auto" else settings.beta
    removed = allocate(curves, _allowance(flops, costs, settings), beta)
    masks = {name: removals[name].mask(removed[name]) for name in layers}

    bytes_dense = len(save(model.state_dict()))
    dense = evaluate_model(model, validation, recipe, device, progress, "evaluating the dense model")
    model.cpu()
    if settings.method == "obs":
        for done, (name, layer) in enumerate(layers.items(), start=1):
            new = compensated(layer.weight.detach(), statistics[name].hessian, masks[name], settings.block)
            layer.weight.data = new
            progress("compensating", done, len(layers), name)
    sparsify(model, masks, settings.block)
    pruned = evaluate_model(model, validation, recipe, device, progress, "evaluating the pruned model")
    names = class_names(validation.source)
    if names:
        model.pretrained_cfg["label_names"] = names
    data = {"dataset": recipe.data.dataset, "root": str(recipe.data.root or ""), "split": recipe.data.val_split}
    save_model(work, model, model_config(recipe.model, model, data=data, parent=recipe.model.model_dump(mode="json")))

    reports = [_layer_report(name, settings.block, removals[name], masks[name], removed[name], costs[name]) for name in layers]
    saved = sum(layer.flops_dense - layer.flops for layer in reports)
    return PruneReport(
        device=describe_device(device),
        notes=_notes(validation, flops, costs, settings),
        method=settings.method,
        beta=beta,
        layers=reports,
        flops_dense=flops.total,
        flops=flops.total - saved,
        linear_kept_fraction=_weights_kept(costs, masks),
        bytes_dense=bytes_dense,
        bytes=sum(path.stat().st_size for path in work.iterdir()),
        accuracy_dense=dense,
        accuracy=pruned,
        skipped_images=len(validation.skipped),
    )


def remove_order(
    layers: dict[str, nn.Linear], statistics: dict[str, LayerStatistics], settings: PruneSection, progress: Progress
) -> dict[str, Removal]:
    method = METHODS[settings.method]
    removals = {}
    for done, (name, layer) in enumerate(layers.items(), start=1):
        removals[name] = method(layer.weight.detach(), statistics[name], settings.block)
        progress("layer curves", done, len(layers), name)
    return removals


def _curve(removal: Removal, cost: LayerCost, settings: PruneSection) -> Curve:
    counted = cost.flops if settings.budget.flops is not None else cost.weights
    blocks = len(removal.order)
    must_keep = math.ceil(settings.min_keep * blocks)
    return Curve(removal.distortion, removal.along(cost.energy_pj), removal.along(counted), most_removals=blocks - must_keep)


def _allowance(flops: ModelFlops, costs: dict[str, LayerCost], settings: PruneSection) -> float:
    """What the prunable layers may keep, in the unit the budget counts."""
    if settings.budget.flops is not None:
        fixed = flops.total - sum(float(cost.flops.sum()) for cost in costs.values())
        return settings.budget.flops * flops.total - fixed
    assert settings.budget.sparsity is not None
    return (1 - settings.budget.sparsity) * sum(float(cost.weights.sum()) for cost in costs.values())


def _layer_report(name: str, block: Block, removal: Removal, mask: torch.Tensor, removed: int, cost: LayerCost) -> LayerReport:
    whole = torch.ones_like(mask)
    return LayerReport(
        name=name,
        shape=cost.shape,
        block=block,
        blocks=mask.numel(),
        kept_blocks=int(mask.sum()),
        kept_map=["".join("#" if kept else "." for kept in row) for row in mask.tolist()],
        distortion=float(removal.distortion[removed]),
        flops_dense=int(cost.flops.sum()),
        flops=int(cost.flops[mask].sum()),
        energy_uj_dense=cost.predicted_energy_uj(whole),
        energy_uj=cost.predicted_energy_uj(mask),
    )


def _weights_kept(costs: dict[str, LayerCost], masks: dict[str, torch.Tensor]) -> float:
    kept = sum(float(costs[name].weights[mask].sum()) for name, mask in masks.items())
    return kept / sum(float(cost.weights.sum()) for cost in costs.values())


def _notes(validation: Batches, flops: ModelFlops, costs: dict[str, LayerCost], settings: PruneSection) -> list[str]:
    notes = []
    if validation.skipped:
        notes.append(f"{len(validation.skipped)} unreadable images skipped (first: {validation.skipped[0]})")
    if len({flops.tokens[name] for name in costs}) == 1:
        notes.append(
            "every layer sees the same number of tokens, so a block costs the same power everywhere: beta changes nothing"
        )
    return notes
