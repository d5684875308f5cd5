"""Reorder before removing: features sorted by what pruning their weights costs, so that like lies beside like in blocks.

Free at run time: the function stays, only whole blocks become unimportant. `models.order` proves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lpvit_cli import distributed
from lpvit_cli.curvature import LayerStatistics
from lpvit_cli.models.axes import Axis, Member, axes
from lpvit_cli.models.order import find_order, positions
from lpvit_cli.pruning.block_obs import _inverse, damped


class Reordered(NamedTuple):
    """A copy of a model in another order, the statistics of its layers in the same, and what had to stay."""

    model: nn.Module
    statistics: dict[str, LayerStatistics]
    notes: list[str]


def reordered(
    model: nn.Module, layers: Mapping[str, nn.Linear], statistics: Mapping[str, LayerStatistics], images: Tensor
) -> Reordered:
    """A copy of the dense `model` with the most important features of every axis first, where `images` prove that it gives
    the same. `layers`: those that will be pruned, by name; axes that none of them has a part in stay."""
    found = axes(model)

    def scored() -> dict[str, Tensor]:
        elements = {name: saliency(layer.weight.detach(), statistics[name]) for name, layer in layers.items()}
        return {axis.name: scores for axis in found if (scores := feature_scores(axis, elements)) is not None}

    scores = distributed.on_main(scored)
    ordered = find_order(model, found, scores, images)
    return Reordered(ordered.model, permuted(statistics, ordered.axes, ordered.orders), ordered.notes)


def saliency(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """What removing each single weight costs [out, in]: S_rr w_rc^2 / (H^-1)_cc, others making up for it."""
    inverse = _inverse(damped(statistics.token_hessian)).diagonal().to(weight)
    return statistics.loss_weights.diagonal().to(weight)[:, None] * weight.square() / inverse


def feature_scores(axis: Axis, elements: Mapping[str, Tensor]) -> Tensor | None:
    """The sum [size] over the weights of each feature in `elements`, [out, in] by layer; None where it has none there."""
    parts = [elements[name].sum(dim=1 - m.dim)[m.index].sum(dim=0).cpu() for name, m in _of_layers([axis], elements)]
    return torch.stack(parts).sum(dim=0) if parts else None


def permuted(
    statistics: Mapping[str, LayerStatistics], found: Iterable[Axis], orders: Mapping[str, Tensor]
) -> dict[str, LayerStatistics]:
    """The statistics of the same layers after `reorder`: as if they had been collected then."""
    result = dict(statistics)
    for axis in found:
        for name, member in _of_layers([axis], statistics):
            of = result[name]
            result[name] = of.select(member.dim, positions(member, orders[axis.name], of.gradient.shape[member.dim]))
    return result


def _of_layers(found: Iterable[Axis], names: Iterable[str]) -> Iterator[tuple[str, Member]]:
    """Members that are weights of the named layers."""
    weights = {f"{name}.weight": name for name in names}
    return ((weights[member.tensor], member) for axis in found for member in axis.members if member.tensor in weights)
