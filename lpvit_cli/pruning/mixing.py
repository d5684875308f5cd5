"""Whole neurons and heads, and blocks inside of what stays, under one budget.

Units leave nothing behind and run as fast as a dense layer; blocks choose more finely. So some of the budget is met by units,
shared freely between MLPs and heads, and the rest by blocks of the narrower layers: how much, the model tells that is nearest
to the dense one on held-back images, units alone and blocks alone among them.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor, nn

from lpvit_cli.curvature import LayerStatistics
from lpvit_cli.errors import UsageError
from lpvit_cli.models.coupled import coupled
from lpvit_cli.models.narrow import narrow
from lpvit_cli.progress import Progress
from lpvit_cli.pruning.coupling import Coupling
from lpvit_cli.pruning.plan import Plan, grouped
from lpvit_cli.recipe.prune import Budget

SHARES = (1.0, 2 / 3, 1 / 3, 0.0)  # of what goes, as units


def mixed(plan: Plan, budget: Budget, progress: Progress) -> tuple[Plan, str]:
    """The plan whose pruning under `budget` is nearest to the dense model: `plan`, of units, or one of blocks in a model that
    has lost some of them; and a note on it. Raises UsageError where none can meet the budget."""
    nearest, chosen, refusal = plan, 1.0, None
    distances: dict[float, float] = {}
    for share in SHARES:
        try:
            candidate = plan if share == 1 else narrowed(plan, budget, share, progress)
            distances[share] = candidate.method.distance(budget, progress)
        except UsageError as error:
            refusal = error
            continue
        if distances[share] == min(distances.values()):
            nearest, chosen = candidate, share
    if not distances:
        assert refusal is not None
        raise refusal
    return nearest, f"{chosen:.0%} of what goes are whole neurons and heads, the rest blocks"


def narrowed(plan: Plan, budget: Budget, share: float, progress: Progress) -> Plan:
    """Blocks of a model that has lost the units which are `share` of what the budget takes."""
    allocation = plan.allocation(budget, share=share)
    model, statistics, rows = copy.deepcopy(plan.model), dict(plan.statistics), dict(plan.rows)
    for name, mask in allocation.planned_masks().items():
        coupling = plan.groups[name].coupling
        if coupling is None or mask.all():
            continue
        consumer = model.get_submodule(name)
        assert isinstance(consumer, nn.Linear)
        consumer.weight.data = plan.method.compensated(name, mask, coupling.block)
        rows |= _narrow(model, coupling, mask, statistics)
    settings = plan.settings.model_copy(update={"patterns": tuple(p for p in plan.settings.patterns if p == "balanced")})
    inner = replace(plan, settings=settings, model=model, statistics=statistics, rows=rows, whole=plan, groups={})
    return grouped(inner, progress)


def _narrow(model: nn.Module, coupling: Coupling, mask: Tensor, statistics: dict[str, LayerStatistics]) -> dict[str, Tensor]:
    """Cut units out of the model and the statistics, in place; returns the rows that each producer keeps."""
    module, keep = model.get_submodule(coupling.module), coupling.kept(mask)
    found = coupled(module)
    assert found is not None
    rows, columns = found.rows(keep), found.columns(keep)
    for producer in coupling.producers:
        statistics[producer] = statistics[producer].select(0, rows)
    statistics[coupling.consumer] = statistics[coupling.consumer].select(1, columns)
    narrow(module, keep)
    return dict.fromkeys(coupling.producers, rows)
