"""obs: exact greedy removal (block_obs.py), the kept weights making up for what goes; the default.

Layers are weighed against each other by the gradients of their outputs. Those of the dense model say little about a model that
has lost most of its blocks, so other weights are tried too: relative errors of outputs, and `prune.reweigh` times the gradients
of the model pruned so far. Those whose model is nearest to the dense one on images that were held back are taken.
With `prune.sequential` each layer is then pruned on the inputs that the already pruned ones give it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lpvit_cli.curvature import LayerStatistics, TokenWeights, output_moments
from lpvit_cli.distributed import broadcast, on_main
from lpvit_cli.measure.memory import release_memory
from lpvit_cli.progress import Progress
from lpvit_cli.pruning.block_obs import compensated, removal_order
from lpvit_cli.pruning.blocks import Block
from lpvit_cli.pruning.groups import Group
from lpvit_cli.pruning.methods.base import Method
from lpvit_cli.pruning.plan import Allocation, Plan
from lpvit_cli.pruning.removal import Removal
from lpvit_cli.pruning.sequential import Pruning, Target, prune_sequentially
from lpvit_cli.recipe.prune import Budget
from lpvit_cli.registry import BUDGETS
from lpvit_cli.tokens.blocks import merging_of

if TYPE_CHECKING:
    from lpvit_cli.pruning.methods.base import Pruned

GRADIENTS, RELATIVE = "gradients of the dense model", "relative errors of their outputs"


@dataclass(frozen=True)
class Weighing:
    """What errors of each layer's outputs cost [out, out], by layer, and what each group then loses."""

    by: str
    weights: dict[str, Tensor]
    allocation: Allocation
    tokens: TokenWeights | None = None  # of the same gradients


class Obs(Method):
    takes_patterns = True

    def removal(self, layer: str, block: Block, balanced: bool) -> Removal:
        device = self.plan.device
        return obs(self.plan.weight(layer).to(device), self.plan.statistics[layer].to(device), block, balanced)

    def prune(self, budget: Budget, progress: Progress) -> Pruned:
        return self.prune_all([(self.plan, budget)], progress)[0]

    @classmethod
    def prune_all(cls, wanted: Sequence[tuple[Plan, Budget]], progress: Progress) -> list[Pruned]:
        """Each as `prune` makes it, in one walk over the layers, where they are pruned in sequence."""
        weighings = [nearest(plan, budget, progress) for plan, budget in wanted]
        if wanted[0][0].settings.sequential:
            made = _in_sequence(wanted, weighings, progress)
        else:
            made = [_each_alone(plan, one.allocation, progress) for (plan, _), one in zip(wanted, weighings, strict=True)]
        return [
            (model, replace(one.allocation, told=[f"layers weighed by {one.by}"]), masks)
            for (model, masks), one in zip(made, weighings, strict=True)
        ]

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.plan)

    @cached_property
    def relative(self) -> tuple[dict[str, Tensor], dict[str, Group]]:
        """Weights without gradients, of each layer's squared error relative to the squares of its outputs; and the groups."""
        weights, plan = {}, self.plan
        for name in plan.groups:
            weight, hessian = plan.weight(name), plan.statistics[name].token_hessian
            power = ((weight @ hessian) * weight).sum() / 2
            weights[name] = torch.eye(len(weight)) / power.clamp_min(torch.finfo(power.dtype).tiny)
        return weights, _reweighed(plan, weights)

    def compensated(self, name: str, mask: Tensor, block: Block) -> Tensor:
        """The weight [out, in] of a layer for a mask of its blocks, on the dense model's inputs; on the CPU."""
        weight, statistics = self.plan.weight(name).to(self.plan.device), self.plan.statistics[name]
        return on_main(lambda: compensated(weight, statistics.token_hessian.to(weight.device), mask, block).cpu())

    def distance(self, budget: Budget, progress: Progress) -> float:
        """How far from the dense model pruning takes it, each layer for itself and weighed by the dense model's gradients."""
        model, _ = _each_alone(self.plan, self.plan.allocation(budget), progress)
        return float(self.plan.dense.method.judge(model))

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
    found = removal_order(weight, statistics.token_hessian / 2, block, statistics.loss_weights)
    return Removal.greedy(*found, balanced)


class Judge:
    """How far models are from the dense one of a plan, on its held-back images, or where there are none, on those of the
    statistics."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.reference = self._outputs(plan.reference or plan.model)

    def __call__(self, model: nn.Module) -> float:
        distance = self.plan.task.divergence(self._outputs(model), self.reference)
        release_memory()
        return broadcast(math.inf if math.isnan(distance) else distance)

    def _outputs(self, model: nn.Module) -> Tensor:
        plan = self.plan
        outputs = plan.task.outputs(model, plan.held_back or plan.calibration, plan.device, plan.dtype)
        model.cpu()
        return outputs


def nearest(plan: Plan, budget: Budget, progress: Progress) -> Weighing:
    """By the gradients of the dense model; with `prune.reweigh`, of all weighings the one whose model, each layer pruned for
    itself, is nearest to the dense one on held-back images."""
    weights = {name: plan.statistics[name].loss_weights for name in plan.groups}
    best = Weighing(GRADIENTS, weights, plan.allocation(budget))
    if not plan.settings.reweigh:
        return best
    rounds, judge = plan.settings.reweigh, plan.dense.method.judge

    def made(weighing: Weighing) -> tuple[float, nn.Module]:
        model, _ = _each_alone(plan, weighing.allocation, progress)
        return judge(model), model

    distance, model = made(best)
    for done in range(rounds + 1):
        weighing = _by_pruned(plan, best, model, budget, done) if done else _by_relative_errors(plan, budget)
        further, other = made(weighing)
        progress("reweighing", done, rounds, f"round {done} of {rounds}")
        if further < distance:
            best, distance, model = weighing, further, other
        elif done:
            best = replace(best, tokens=best.tokens or weighing.tokens)
    return best


def _by_relative_errors(plan: Plan, budget: Budget) -> Weighing:
    weights, groups = plan.method.relative
    return Weighing(RELATIVE, weights, plan.allocation(budget, groups))


def _by_pruned(plan: Plan, best: Weighing, model: nn.Module, budget: Budget, number: int) -> Weighing:
    """The gradients of the dense model, and those of a pruned one."""
    heights = dict.fromkeys(plan.layers, 1)  # of those that lose nothing, only the weights of tokens are read
    heights |= {name: math.lcm(*(option.block[0] for option in group.options)) for name, group in plan.groups.items()}
    moments, tokens = output_moments(model, heights, plan.calibration, plan.new_loss(), plan.device, plan.dtype)
    model.cpu()
    weights = {
        name: plan.statistics[name].loss_weights + moments[name].cpu() / plan.statistics[name].images for name in plan.groups
    }
    allocation = plan.allocation(budget, _reweighed(plan, weights))
    return Weighing(f"gradients of the dense and the pruned model (round {number})", weights, allocation, tokens)


def _reweighed(plan: Plan, weights: dict[str, Tensor]) -> dict[str, Group]:
    groups = {}
    for name, group in plan.groups.items():
        old = plan.statistics[name].loss_weights
        options = [option.reweighed(old, weights[name], group.balanced) for option in group.options]
        groups[name] = replace(group, options=options)
    return groups


def _each_alone(plan: Plan, allocation: Allocation, progress: Progress) -> tuple[nn.Module, dict[str, Tensor]]:
    """Least squares on the dense model's inputs, layer by layer."""
    model, masks = copy.deepcopy(plan.model), allocation.planned_masks()
    for done, (name, mask) in enumerate(masks.items(), start=1):
        model.get_submodule(name).weight.data = plan.method.compensated(name, mask, allocation.option(name).block)
        progress("compensating", done, len(masks), name)
    return model, masks


def _in_sequence(
    wanted: Sequence[tuple[Plan, Budget]], weighings: Sequence[Weighing], progress: Progress
) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    dense, device, prunings, done = wanted[0][0].dense, wanted[0][0].device, [], list[str]()
    for (plan, budget), one in zip(wanted, weighings, strict=True):
        points = one.allocation.points
        targets = {name: _target(one.allocation, budget, name) if name in points else None for name in plan.layers}
        model = copy.deepcopy(plan.model).to(device)
        tokens = None if merging_of(model) else one.tokens  # of a model that merges, each pass may merge others
        prunings.append(Pruning(model, targets, one.weights, tokens, plan.rows))

    def on_layer(name: str) -> None:
        done.append(name)
        progress("pruning in sequence", len(done), len(dense.layers), name)

    batches = [images.to(dense.dtype) for images, _ in dense.calibration]
    masks = prune_sequentially(dense.model.to(device), prunings, batches, on_layer, dense.dtype)
    dense.model.cpu()
    return [(pruning.model, mask) for pruning, mask in zip(prunings, masks, strict=True)]


def _target(allocation: Allocation, budget: Budget, name: str) -> Target:
    """What the budget counts of the planned blocks must hold for those that are removed."""
    option = allocation.option(name)
    costs = BUDGETS.get(budget.kind).of_blocks(option)
    kept = float(option.removal.along(costs)[allocation.points[name].removed])
    return Target(option.block, costs, kept, allocation.groups[name].balanced)
