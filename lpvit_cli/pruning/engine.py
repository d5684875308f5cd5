"""Making a plan's pruned model: the method removes and compensates, and what was removed leaves the model."""

from __future__ import annotations

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
    if plan.settings.is_mixed:
        plan = mixed(plan, budget, progress)
    model, allocation, masks = plan.method.prune(budget, progress)
    return _packed(plan, model.cpu(), allocation, masks)


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
