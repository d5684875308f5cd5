"""Layers that are coupled: hidden neurons and attention heads leave all layers that hold them, and no zeros behind.

A coupling joins linear layers: only `consumer` reads the outputs of `producers`. Pruning columns of the consumer, its kept
weights making up for them, frees the producers' rows: the consumer decides, and what all of them cost is saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lpvit_cli.errors import UsageError
from lpvit_cli.models.coupled import coupled
from lpvit_cli.pruning.blocks import Block


@dataclass(frozen=True)
class Coupling:
    """Units of `width` features between layers. `repeats`: places of a unit in the rows of each producer (q, k and v)."""

    module: str
    producers: tuple[str, ...]
    consumer: str
    width: int
    repeats: int
    consumer_out: int
    heads: bool

    @property
    def block(self) -> Block:
        """What goes from the consumer with a unit: its whole columns."""
        return self.consumer_out, self.width

    def kept(self, mask: Tensor) -> Tensor:
        """What `narrow` is to keep, by index: heads, or single neurons."""
        units = mask[0].nonzero()[:, 0]
        return units if self.heads else (units[:, None] * self.width + torch.arange(self.width)).flatten()

    def producer_mask(self, mask: Tensor) -> Tensor:
        """Block mask [repeats * units, 1] of each producer, blocks of `width` rows, for one [1, units] of the consumer."""
        return mask.T.repeat(self.repeats, 1)


def find_couplings(model: nn.Module, layers: dict[str, nn.Linear], patterns: Iterable[str], width: int) -> dict[str, Coupling]:
    """The couplings by `neurons` (in units of `width`) and `heads` among `layers`, by the consumer's name.

    Raises UsageError when the model has none, or when `width` does not divide an MLP's hidden features.
    """
    found: dict[str, Coupling] = {}
    for pattern in patterns:
        kin = [one for name, module in model.named_modules() if (one := _coupling(name, module, pattern, width))]
        kin = [one for one in kin if {*one.producers, one.consumer} <= layers.keys()]
        if not kin:
            raise UsageError(
                f"prune.patterns: {pattern}: no module of this model can lose {pattern} as a whole",
                "it takes an MLP or attention of timm or transformers, all its layers in prune.layers; leave the pattern out",
            )
        for one in kin:
            features = layers[one.consumer].in_features
            if features % one.width:
                raise UsageError(
                    f"prune.patterns: neurons: groups of {one.width} do not divide the {features} of {one.consumer}",
                    "choose a block width (the second number of prune.block) that does",
                )
            found[one.consumer] = one
    return found


def _coupling(name: str, module: nn.Module, pattern: str, width: int) -> Coupling | None:
    found = coupled(module)
    if found is None or not found.plain or found.heads != (pattern == "heads"):
        return None
    out = getattr(module, found.consumer).out_features
    producers = tuple(f"{name}.{producer}" for producer in found.producers)
    unit = found.width if found.heads else width
    return Coupling(name, producers, f"{name}.{found.consumer}", unit, found.repeats, out, found.heads)
