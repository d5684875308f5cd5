"""Making a plan's pruned model: the method removes and compensates, and what was removed leaves the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lpvit_cli.models.narrow import narrow
from lpvit_cli.progress import Progress
from lpvit_cli.pruning.mixing import mixed
from lpvit_cli.pruning.plan import Allocation, Plan
from lpvit_cli.recipe.prune import Budget
from lpvit_cli.sparse import sparsify


def prune_model(plan: Plan, budget: Budget, progress: Progress) -> tuple[nn.Module, Allocation]:
    """A pruned copy of the plan's model under a budget that counts costs, and what each group has lost."""
    return prune_models(plan, [budget], progress)[0]


def prune_models(plan: Plan, budgets: Sequence[Budget], progress: Progress) -> list[tuple[nn.Module, Allocation]]:
    """As `prune_model`, one for each budget; the passes of the dense model are made once for all of them."""
    plans, told = [plan] * len(budgets), [list[str]()] * len(budgets)
    if plan.settings.is_mixed:
        chosen = [mixed(plan, budget, progress) for budget in budgets]
        plans, told = [nearest for nearest, _ in chosen], [[note] for _, note in chosen]
    made = plan.method.prune_all(list(zip(plans, budgets, strict=True)), progress)
    return [
        _packed(one, model.cpu(), replace(allocation, told=[*notes, *allocation.told]), masks)
        for one, notes, (model, allocation, masks) in zip(plans, told, made, strict=True)
    ]


def _packed(plan: Plan, model: nn.Module, allocation: Allocation, masks: dict[str, Tensor]) -> tuple[nn.Module, Allocation]:
    """Removed blocks leave the model: zero blocks are not stored, neurons and heads are cut out."""
    for name, mask in masks.items():
        group, whole = allocation.groups[name], [name] if mask.all() else []
        if group.coupling:
            narrow(model.get_submodule(group.coupling.module), group.coupling.kept(mask))
            whole = [*group.coupling.producers, group.coupling.consumer]
        elif not whole:
            sparsify(model, {name: mask}, allocation.option(name).block)
        for layer in whole:  # one block: runs as a dense layer does
            dense = model.get_submodule(layer)
            assert isinstance(dense, nn.Linear)
            sparsify(model, {layer: torch.ones(1, 1, dtype=torch.bool)}, (dense.out_features, dense.in_features))
    by_layer: dict[str, Tensor] = {}
    for name in plan.groups:
        by_layer |= allocation.groups[name].masks(name, masks[name])
    return model, replace(allocation, masks={name: by_layer[name] for name in plan.layers})
