"""obs: exact greedy removal (block_obs.py), the kept weights making up for what goes; the default.

Layers are weighed by the gradients of their outputs; those of the dense model say little about a model that has lost most of
its blocks. So `prune.reweigh` times the gradients of the model pruned so far are added, and the budget is allocated anew.
With `prune.sequential` each layer is then pruned on the inputs that the already pruned ones give it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from lpvit_cli.curvature import LayerStatistics, output_moments
from lpvit_cli.measure.memory import release_memory
from lpvit_cli.progress import Progress
from lpvit_cli.pruning.block_obs import compensated, removal_order
from lpvit_cli.pruning.blocks import Block
from lpvit_cli.pruning.groups import Group
from lpvit_cli.pruning.methods.base import Method
from lpvit_cli.pruning.plan import Allocation, Plan
from lpvit_cli.pruning.removal import Removal
from lpvit_cli.pruning.sequential import Target, prune_sequentially
from lpvit_cli.recipe.prune import Budget
from lpvit_cli.registry import BUDGETS


class Obs(Method):
    takes_patterns = True

    def removal(self, layer: str, block: Block, balanced: bool) -> Removal:
        device = self.plan.device
        return obs(self.plan.weight(layer).to(device), self.plan.statistics[layer].to(device), block, balanced)

    def prune(self, budget: Budget, progress: Progress) -> tuple[nn.Module, Allocation, dict[str, Tensor]]:
        plan = self.plan
        weights = {name: plan.statistics[name].loss_weights for name in plan.groups}
        allocation = plan.allocation(budget)
        if plan.settings.reweigh:
            allocation, weights = weigh_anew(plan, allocation, weights, budget, progress)
        if plan.settings.sequential:
            model, masks = _in_sequence(plan, allocation, weights, budget, progress)
        else:
            model, masks = _each_alone(plan, allocation, progress)
        return model, allocation, masks

    def notes(self) -> list[str]:
        plan, notes = self.plan, []
        few = {name: layer for name, layer in plan.statistics.items() if layer.tokens < len(layer.A)}
        if few:
            name, layer = max(few.items(), key=lambda item: len(item[1].A) / item[1].tokens)
            notes.append(
                f"calibration saw {layer.tokens} tokens of {name}, fewer than its {len(layer.A)} inputs "
                f"({len(few)} such layers): raise calibrate.images"
            )
        return notes


def obs(weight: Tensor, statistics: LayerStatistics, block: Block, balanced: bool = False) -> Removal:
    """Exact greedy removal with compensation, errors of the outputs weighted by T S: units of the per-image loss."""
    found = removal_order(weight, statistics.hessian / 2, block, statistics.loss_weights)
    return Removal.greedy(*found, balanced)


def weigh_anew(
    plan: Plan, allocation: Allocation, weights: dict[str, Tensor], budget: Budget, progress: Progress
) -> tuple[Allocation, dict[str, Tensor]]:
    """Of the allocations of all rounds, the one whose model is nearest to the dense one on the calibration images."""
    rounds, device = plan.settings.reweigh, plan.device
    reference = plan.task.outputs(plan.model, plan.calibration, device, plan.dtype)
    plan.model.cpu()
    heights = {name: math.lcm(*(option.block[0] for option in group.options)) for name, group in plan.groups.items()}
    model, nearest, best = plan.model, math.inf, (allocation, weights)
    for done in range(rounds + 1):
        if done:
            moments = output_moments(model, heights, plan.calibration, plan.new_loss(), device, plan.dtype)
            weights = {
                name: plan.statistics[name].loss_weights + moment.cpu() / plan.statistics[name].images
                for name, moment in moments.items()
            }
            allocation = plan.allocation(budget, _reweighed(plan, weights))
        model, _ = _each_alone(plan, allocation, progress)
        progress("reweighing", done, rounds, f"round {done} of {rounds}")
        release_memory()
        distance = plan.task.divergence(plan.task.outputs(model, plan.calibration, device, plan.dtype), reference)
        if distance < nearest:  # NaN is not
            nearest, best = distance, (allocation, weights)
    return best


def _reweighed(plan: Plan, weights: dict[str, Tensor]) -> dict[str, Group]:
    groups = {}
    for name, group in plan.groups.items():
        old = plan.statistics[name].loss_weights
        options = [option.reweighed(old, weights[name], group.balanced) for option in group.options]
        groups[name] = replace(group, options=options)
    return groups


def _each_alone(plan: Plan, allocation: Allocation, progress: Progress) -> tuple[nn.Module, dict[str, Tensor]]:
    """Least squares on the dense model's inputs, layer by layer."""
    model, masks, device = copy.deepcopy(plan.model), allocation.planned_masks(), plan.device
    for done, (name, mask) in enumerate(masks.items(), start=1):
        weight, hessian = plan.weight(name).to(device), plan.statistics[name].hessian.to(device)
        model.get_submodule(name).weight.data = compensated(weight, hessian, mask, allocation.option(name).block).cpu()
        progress("compensating", done, len(masks), name)
    return model, masks


def _in_sequence(
    plan: Plan, allocation: Allocation, weights: dict[str, Tensor], budget: Budget, progress: Progress
) -> tuple[nn.Module, dict[str, Tensor]]:
    device = plan.device
    targets = {name: _target(allocation, budget, name) if name in allocation.points else None for name in plan.layers}
    done: list[str] = []

    def on_layer(name: str) -> None:
        done.append(name)
        progress("pruning in sequence", len(done), len(targets), name)

    model = copy.deepcopy(plan.model).to(device)
    batches = [images.to(plan.dtype) for images, _ in plan.calibration]
    masks = prune_sequentially(plan.model.to(device), model, targets, weights, batches, on_layer, plan.dtype)
    plan.model.cpu()
    return model, masks


def _target(allocation: Allocation, budget: Budget, name: str) -> Target:
    """What the budget counts of the planned blocks must hold for those that are removed."""
    option = allocation.option(name)
    costs = BUDGETS.get(budget.kind).of_blocks(option)
    kept = float(option.removal.along(costs)[allocation.points[name].removed])
    return Target(option.block, costs, kept, allocation.groups[name].balanced)
