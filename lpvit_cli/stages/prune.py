"""prune: curves, allocation, masks, compensated weights -> RUN/pruned/, a model folder with packed weights.

A `Plan` holds all that does not depend on the budget, so that a sweep and the search for an accuracy make many models of one.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lpvit_cli.curvature import LayerStatistics, load_statistics
from lpvit_cli.data import Batches, class_names
from lpvit_cli.errors import UsageError
from lpvit_cli.measure.accuracy import Accuracy
from lpvit_cli.models import VisionModel, build_model, describe_device, device_of, model_config, prunable_layers, save_model
from lpvit_cli.pruning.allocate import Curve, allocate, automatic_beta
from lpvit_cli.pruning.blocks import Block, require_fit
from lpvit_cli.pruning.cost import LayerCost, ModelFlops, count_flops, layer_cost
from lpvit_cli.pruning.saliency import METHODS, Removal
from lpvit_cli.pruning.sequential import prune_sequentially
from lpvit_cli.pruning.surgeon import compensated
from lpvit_cli.recipe import Budget, PruneSection, Recipe
from lpvit_cli.report.schema import LayerReport, PruneReport
from lpvit_cli.run import Progress, Run
from lpvit_cli.sparse import sparsify
from lpvit_cli.stages import CALIBRATE
from lpvit_cli.stages.calibrate import STATISTICS, calibration_batches
from lpvit_cli.stages.evaluate import evaluate_model, validation_batches

SEARCH_STEP = 0.01  # of the FLOPs: how finely the search for an accuracy looks


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> PruneReport:
    plan = make_plan(recipe, run, progress)
    dense = plan.evaluate(plan.model, progress, "evaluating the dense model")
    budget = recipe.prune.budget
    if budget.max_drop is not None:
        budget = search(plan, dense.top1 - budget.max_drop, progress)
    return prune_to(plan, budget, dense, work, progress)


@dataclass
class Plan:
    """What one calibration says about every pruning of a model."""

    recipe: Recipe
    model: VisionModel  # dense, on the CPU between evaluations
    layers: dict[str, nn.Linear]
    statistics: dict[str, LayerStatistics]
    flops: ModelFlops
    costs: dict[str, LayerCost]
    removals: dict[str, Removal]
    validation: Batches
    calibration: list[Tensor] | None  # images, for sequential pruning

    @property
    def settings(self) -> PruneSection:
        return self.recipe.prune

    def allocation(self, budget: Budget) -> tuple[dict[str, int], float]:
        """Removals of every layer under a FLOPs or sparsity budget, and the beta they were chosen with."""
        curves = {name: self._curve(name, by_flops=budget.flops is not None) for name in self.layers}
        beta = automatic_beta(curves) if self.settings.beta == "auto" else self.settings.beta
        return allocate(curves, self._allowance(budget), beta), beta

    def pruned(self, removed: dict[str, int], progress: Progress) -> tuple[VisionModel, dict[str, Tensor]]:
        """A block-sparse copy of the model, and its masks; with `obs` the kept weights make up for the removed ones."""
        model, block = copy.deepcopy(self.model), self.settings.block
        done: list[str] = []

        def on_layer(name: str) -> None:
            done.append(name)
            progress("compensating", len(done), len(self.layers), name)

        if self.calibration is not None:
            row_weights = {name: layer.loss_weights for name, layer in self.statistics.items()}
            masks = prune_sequentially(self.model, model, removed, row_weights, self.calibration, block, on_layer)
        else:
            masks = {name: removal.mask(removed[name]) for name, removal in self.removals.items()}
            if self.settings.method == "obs":
                for name, layer in self.layers.items():
                    new = compensated(layer.weight.detach(), self.statistics[name].hessian, masks[name], block)
                    model.get_submodule(name).weight.data = new
                    on_layer(name)
        sparsify(model, masks, block)
        return model, masks

    def evaluate(self, model: VisionModel, progress: Progress, what: str) -> Accuracy:
        result = evaluate_model(model, self.validation, self.recipe, device_of(self.recipe), progress, what)
        model.cpu()
        return result

    def lowest_flops(self) -> float:
        """The fraction of the model's FLOPs that min_keep allows to reach."""
        least = sum(float(self._curve(name, by_flops=True).kept_cost[self._most(name)]) for name in self.layers)
        return (self._fixed_flops() + least) / self.flops.total

    def _most(self, name: str) -> int:
        blocks = len(self.removals[name].order)
        return blocks - math.ceil(self.settings.min_keep * blocks - 1e-9)

    def _curve(self, name: str, by_flops: bool) -> Curve:
        removal, cost = self.removals[name], self.costs[name]
        counted = cost.flops if by_flops else cost.weights
        return Curve(removal.distortion, removal.along(cost.energy_pj), removal.along(counted), self._most(name))

    def _fixed_flops(self) -> float:
        return self.flops.total - sum(float(cost.flops.sum()) for cost in self.costs.values())

    def _allowance(self, budget: Budget) -> float:
        """What the prunable layers may keep, in the unit the budget counts."""
        if budget.flops is not None:
            return budget.flops * self.flops.total - self._fixed_flops()
        assert budget.sparsity is not None
        return (1 - budget.sparsity) * sum(float(cost.weights.sum()) for cost in self.costs.values())


def make_plan(recipe: Recipe, run: Run, progress: Progress) -> Plan:
    torch.manual_seed(recipe.seed)
    settings = recipe.prune
    model = build_model(recipe.model)
    layers = prunable_layers(model, settings.layers)
    for name, layer in layers.items():
        require_fit(name, (layer.out_features, layer.in_features), settings.block)
    validation = validation_batches(recipe, model)
    names = class_names(validation.source)
    if names:
        model.pretrained_cfg["label_names"] = names
    statistics = load_statistics(run.artefact(CALIBRATE) / STATISTICS, list(layers))
    flops = count_flops(model, layers)
    costs = {name: layer_cost(layer, flops.tokens[name], settings.block, settings.power) for name, layer in layers.items()}
    removals = {}
    for done, (name, layer) in enumerate(layers.items(), start=1):
        removals[name] = METHODS[settings.method](layer.weight.detach(), statistics[name], settings.block)
        progress("layer curves", done, len(layers), name)
    calibration = [images for images, _ in calibration_batches(recipe, model)] if settings.sequential else None
    return Plan(recipe, model, layers, statistics, flops, costs, removals, validation, calibration)


def prune_to(plan: Plan, budget: Budget, dense: Accuracy, work: Path, progress: Progress) -> PruneReport:
    """Prune to a budget, evaluate, and write the model folder `work`."""
    recipe, settings = plan.recipe, plan.settings
    removed, beta = plan.allocation(budget)
    model, masks = plan.pruned(removed, progress)
    accuracy = plan.evaluate(model, progress, "evaluating the pruned model")
    data = {"dataset": recipe.data.dataset, "root": str(recipe.data.root or ""), "split": recipe.data.val_split}
    save_model(work, model, model_config(recipe.model, model, data=data, parent=recipe.model.model_dump(mode="json")))

    predicted = {name: float(removal.distortion[removed[name]]) for name, removal in plan.removals.items()}
    layers = [_layer_report(name, settings.block, masks[name], predicted[name], plan.costs[name]) for name in plan.layers]
    kept = sum(float(cost.weights[masks[name]].sum()) for name, cost in plan.costs.items())
    return PruneReport(
        device=describe_device(device_of(recipe)),
        notes=_notes(plan),
        method=settings.method,
        beta=beta,
        layers=layers,
        flops_dense=plan.flops.total,
        flops=plan.flops.total - sum(layer.flops_dense - layer.flops for layer in layers),
        linear_kept_fraction=kept / sum(float(cost.weights.sum()) for cost in plan.costs.values()),
        bytes_dense=len(save(plan.model.state_dict())),
        bytes=sum(path.stat().st_size for path in work.iterdir()),
        accuracy_dense=dense,
        accuracy=accuracy,
        skipped_images=len(plan.validation.skipped),
    )


def search(plan: Plan, least_top1: float, progress: Progress) -> Budget:
    """The lowest FLOPs budget whose one-shot model still has `least_top1` %, by bisection to a hundredth of the FLOPs.

    Raises UsageError when not even the largest budget below dense reaches it.
    """
    low, high = math.ceil(plan.lowest_flops() / SEARCH_STEP), round(1 / SEARCH_STEP)  # high holds: it is the dense model
    while high - low > 0:
        middle = (low + high) // 2
        budget = Budget(flops=middle * SEARCH_STEP)
        model, _ = plan.pruned(plan.allocation(budget)[0], progress)
        top1 = plan.evaluate(model, progress, f"evaluating at {middle * SEARCH_STEP:.0%} of the FLOPs").top1
        low, high = (low, middle) if top1 >= least_top1 else (middle + 1, high)
    if high * SEARCH_STEP >= 1:
        raise UsageError(
            f"prune.budget: no pruned model keeps a top-1 of {least_top1:.2f} % without recovery",
            "allow a larger max_drop, or give a flops budget and let finetune-lora-ga recover",
        )
    return Budget(flops=high * SEARCH_STEP)


def _layer_report(name: str, block: Block, mask: Tensor, distortion: float, cost: LayerCost) -> LayerReport:
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
        energy_uj_dense=cost.predicted_energy_uj(whole),
        energy_uj=cost.predicted_energy_uj(mask),
    )


def _notes(plan: Plan) -> list[str]:
    notes = []
    if plan.validation.skipped:
        notes.append(f"{len(plan.validation.skipped)} unreadable images skipped (first: {plan.validation.skipped[0]})")
    seen = {name: layer for name, layer in plan.statistics.items() if layer.tokens < len(layer.input_outer)}
    if seen and plan.settings.method == "obs":
        name, layer = max(seen.items(), key=lambda item: len(item[1].input_outer) / item[1].tokens)
        notes.append(
            f"calibration saw {layer.tokens} tokens of {name}, fewer than its {len(layer.input_outer)} inputs "
            f"({len(seen)} such layers): raise calibrate.images"
        )
    if len({plan.flops.tokens[name] for name in plan.costs}) == 1:
        notes.append(
            "every layer sees the same number of tokens, so a block costs the same power everywhere: beta changes nothing"
        )
    return notes
