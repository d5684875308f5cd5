"""What is decided together, and the ways to prune it.

A `Group` is the blocks of one layer, or the neurons or heads that coupled layers share. It has an `Option` for every
block shape: the removal order with the distortion along it, and what a block costs to run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lpvit_cli.models.flops import ModelFlops
from lpvit_cli.pruning.blocks import Block, require_fit
from lpvit_cli.pruning.cost import LayerCost, layer_cost
from lpvit_cli.pruning.coupling import Coupling
from lpvit_cli.pruning.removal import Removal
from lpvit_cli.recipe.prune import Power


@dataclass(frozen=True)
class Option:
    """One way to prune a group: blocks of one shape, the order in which they go, and what each costs to run."""

    block: Block
    removal: Removal
    cost: LayerCost  # of all that goes with a block: where layers are coupled, the producer's rows too

    def reweighed(self, old: Tensor, new: Tensor, balanced: bool) -> Option:
        """The errors of each block row scaled as the mean weight of its outputs has changed; old and new [out, out]."""
        assert self.removal.by_row is not None
        order, errors = self.removal.by_row
        after, before = (weights.diagonal().double().split(self.block[0]) for weights in (new, old))
        ratio = torch.stack([a.sum() / b.sum().clamp_min(1e-300) for a, b in zip(after, before, strict=True)])
        return replace(self, removal=Removal.greedy(order, errors * ratio[:, None], balanced))


@dataclass(frozen=True)
class Group:
    """Blocks of one layer; or of the consumer of a coupling, the producer's rows going along."""

    options: list[Option]
    balanced: bool
    coupling: Coupling | None
    costs: dict[Block, dict[str, LayerCost]]  # of each layer that the group prunes

    def masks(self, layer: str, mask: Tensor) -> dict[str, Tensor]:
        """Block masks of all its layers for one of the layer that decides."""
        if self.coupling is None:
            return {layer: mask}
        return {layer: mask} | dict.fromkeys(self.coupling.producers, self.coupling.producer_mask(mask))


def make_group(
    name: str,
    layers: dict[str, nn.Linear],
    coupling: Coupling | None,
    blocks: tuple[Block, ...],
    balanced: bool,
    flops: ModelFlops,
    power: Power,
    removal: Callable[[str, Block, bool], Removal],
) -> Group:
    """The group that layer `name` decides; `removal` is the method's. Raises UsageError where a block is larger than it."""
    layer = layers[name]
    balanced = coupling is None and balanced
    costs: dict[Block, dict[str, LayerCost]] = {}
    options = []
    for block in [coupling.block] if coupling else blocks:
        require_fit(name, (layer.out_features, layer.in_features), block)
        costs[block] = _costs(name, layers, flops, block, coupling, power)
        cost = _together(coupling, costs[block], flops) if coupling else costs[block][name]
        options.append(Option(block, removal(name, block, balanced), cost))
    return Group(options, balanced, coupling, costs)


def _costs(
    name: str, layers: dict[str, nn.Linear], flops: ModelFlops, block: Block, coupling: Coupling | None, power: Power
) -> dict[str, LayerCost]:
    """By layer, what each block costs; a producer's blocks are whole rows."""
    made = {name: layer_cost(layers[name], flops.tokens[name], block, power)}
    if coupling:
        for producer in coupling.producers:
            rows = layers[producer]
            made[producer] = layer_cost(rows, flops.tokens[producer], (coupling.width, rows.in_features), power)
    return made


def _together(coupling: Coupling, costs: dict[str, LayerCost], flops: ModelFlops) -> LayerCost:
    """What a unit of neurons, or a head, costs in all its layers and between them [1, units]."""
    consumer, producers = costs[coupling.consumer], [costs[name] for name in coupling.producers]

    def of(name: str) -> Tensor:
        columns: Tensor = getattr(consumer, name)
        for producer in producers:
            columns = columns + getattr(producer, name).reshape(coupling.repeats, -1).sum(dim=0)
        return columns

    between = flops.attention.get(coupling.module, 0) / consumer.weights.shape[1]
    fixed = consumer.fixed_energy_pj + sum(producer.fixed_energy_pj for producer in producers)
    return LayerCost(consumer.shape, of("weights"), of("flops") + between, of("energy_pj"), fixed)
