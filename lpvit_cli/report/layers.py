"""What a pruning does to each layer, as report.json has it."""

from __future__ import annotations

import torch
from torch import Tensor

from lpvit_cli.pruning.blocks import Block
from lpvit_cli.pruning.cost import LayerCost
from lpvit_cli.pruning.plan import Allocation, Plan
from lpvit_cli.report.schema import LayerReport


def layer_reports(allocation: Allocation) -> list[LayerReport]:
    """One for each prunable layer; coupled ones share their distortion."""
    plan, masks, reports = allocation.plan, allocation.masks or allocation.planned_masks(), {}
    for name, group in allocation.groups.items():
        block, coupling = allocation.option(name).block, group.coupling
        for layer, mask in group.masks(name, masks[name]).items():
            cost = group.costs[block][layer]
            shape = (coupling.width, cost.shape[1]) if coupling and layer != name else block
            reports[layer] = _layer_report(plan, layer, shape, mask, allocation.distortion(name), cost)
    return [reports[layer] for layer in plan.layers]


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
        flops_dense=2 * plan.dense.flops.tokens[name] * plan.dense.layers[name].weight.numel(),
        flops=int(cost.flops[mask].sum()),
        energy_uj_dense=plan.energy_uj(name, block, whole, cost),
        energy_uj=plan.energy_uj(name, block, mask, cost),
    )
