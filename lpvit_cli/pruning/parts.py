"""What is decided together, and the ways to prune it.

A `Part` is the blocks of one layer, or the neurons or heads that two layers share. Each part has an `Option` for every block
shape: its removal order with the distortion along it, and what a block costs to run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lpvit_cli.curvature import LayerStatistics
from lpvit_cli.pruning.blocks import Block, require_fit
from lpvit_cli.pruning.cost import LayerCost, ModelFlops, layer_cost
from lpvit_cli.pruning.patterns import Pair
from lpvit_cli.pruning.saliency import METHODS, Removal, additive
from lpvit_cli.pruning.surgeon import removal_order
from lpvit_cli.recipe import PruneSection


@dataclass(frozen=True)
class Option:
    """One way to prune a part: blocks of one shape, the order in which they go, and what each costs to run."""

    block: Block
    removal: Removal
    cost: LayerCost  # of all that goes with a block: in a pair, the producer's rows too
    greedy: tuple[Tensor, Tensor] | None  # of obs: order and errors of each block row [rows, cols]

    def reweighed(self, old: Tensor, new: Tensor, balanced: bool) -> Option:
        """The errors of each block row scaled as the mean weight of its outputs has changed; old and new [out, out]."""
        assert self.greedy is not None
        order, errors = self.greedy
        after, before = (weights.diagonal().double().split(self.block[0]) for weights in (new, old))
        ratio = torch.stack([a.sum() / b.sum().clamp_min(1e-300) for a, b in zip(after, before, strict=True)])
        return replace(self, removal=Removal.greedy(order, errors * ratio[:, None], balanced))


@dataclass(frozen=True)
class Part:
    """Blocks of one layer; or of the consumer of a pair, the producer's rows going along."""

    options: list[Option]
    balanced: bool
    pair: Pair | None
    costs: dict[Block, dict[str, LayerCost]]  # of each layer that the part prunes

    def masks(self, layer: str, mask: Tensor) -> dict[str, Tensor]:
        """Block masks of all its layers for one of the layer that decides."""
        return {layer: mask} | ({self.pair.producer: self.pair.producer_mask(mask)} if self.pair else {})


def make_part(
    name: str,
    layers: dict[str, nn.Linear],
    pair: Pair | None,
    statistics: LayerStatistics,
    flops: ModelFlops,
    scores: dict[tuple[str, Block], Tensor],
    settings: PruneSection,
    device: torch.device,
) -> Part:
    """The part that layer `name` decides. `scores` [rows, cols] by layer and block: of the methods whose scores are not made of
    statistics. Raises UsageError where a block is larger than the layer."""
    layer = layers[name]
    balanced = pair is None and "balanced" in settings.patterns
    costs: dict[Block, dict[str, LayerCost]] = {}
    options = []
    for block in [pair.block] if pair else settings.blocks:
        require_fit(name, (layer.out_features, layer.in_features), block)
        costs[block] = _costs(name, layers, flops, block, pair, settings)
        cost = _together(pair, costs[block], flops) if pair else costs[block][name]
        weight, score = layer.weight.detach(), scores.get((name, block))
        options.append(_option(weight, statistics, block, cost, balanced, settings.method, score, device))
    return Part(options, balanced, pair, costs)


def _option(
    weight: Tensor,
    statistics: LayerStatistics,
    block: Block,
    cost: LayerCost,
    balanced: bool,
    method: str,
    score: Tensor | None,
    device: torch.device,
) -> Option:
    """Only obs is worth a GPU."""
    if score is not None:
        return Option(block, additive(score), cost, None)
    if method != "obs":
        return Option(block, METHODS[method](weight, statistics, block), cost, None)
    gathered = statistics.to(device)
    greedy = removal_order(weight.to(device), gathered.hessian / 2, block, gathered.loss_weights)
    return Option(block, Removal.greedy(*greedy, balanced), cost, greedy)


def _costs(
    name: str, layers: dict[str, nn.Linear], flops: ModelFlops, block: Block, pair: Pair | None, settings: PruneSection
) -> dict[str, LayerCost]:
    """By layer, what each block costs; a producer's blocks are whole rows."""
    made = {name: layer_cost(layers[name], flops.tokens[name], block, settings.power)}
    if pair:
        rows = layers[pair.producer]
        made[pair.producer] = layer_cost(rows, flops.tokens[pair.producer], (pair.width, rows.in_features), settings.power)
    return made


def _together(pair: Pair, costs: dict[str, LayerCost], flops: ModelFlops) -> LayerCost:
    """What a group of neurons, or a head, costs in both layers and between them [1, groups]."""
    consumer, producer = costs[pair.consumer], costs[pair.producer]

    def of(name: str) -> Tensor:
        rows: Tensor = getattr(producer, name).reshape(pair.repeats, -1).sum(dim=0)
        columns: Tensor = getattr(consumer, name)
        return columns + rows

    between = flops.attention.get(pair.module, 0) / consumer.weights.shape[1]
    fixed = consumer.fixed_energy_pj + producer.fixed_energy_pj
    return LayerCost(consumer.shape, of("weights"), of("flops") + between, of("energy_pj"), fixed)
