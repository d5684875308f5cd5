"""Layers that are coupled: hidden neurons and attention heads leave all layers that hold them, and no zeros behind.

A coupling joins two linear layers: only `consumer` reads the outputs of `producer`. Pruning columns of the consumer, its kept
weights making up for them, frees the producer's rows: the consumer decides, and what both cost is saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from timm.layers import Mlp
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from lpvit_cli.errors import UsageError
from lpvit_cli.pruning.blocks import Block


@dataclass(frozen=True)
class Coupling:
    """Units of `width` features between two layers. `repeats`: places of a unit in the producer's rows (q, k and v)."""

    module: str
    producer: str
    consumer: str
    width: int
    repeats: int
    consumer_out: int

    @property
    def block(self) -> Block:
        """What goes from the consumer with a unit: its whole columns."""
        return self.consumer_out, self.width

    def kept(self, mask: Tensor) -> Tensor:
        """What `narrow` is to keep, by index: heads, or single neurons."""
        units = mask[0].nonzero()[:, 0]
        return units if self.repeats == 3 else (units[:, None] * self.width + torch.arange(self.width)).flatten()

    def producer_mask(self, mask: Tensor) -> Tensor:
        """Block mask [repeats * units, 1] of the producer, blocks of `width` rows, for one [1, units] of the consumer."""
        return mask.T.repeat(self.repeats, 1)


def find_couplings(model: nn.Module, layers: dict[str, nn.Linear], patterns: Iterable[str], width: int) -> dict[str, Coupling]:
    """The couplings by `neurons` (in units of `width`) and `heads` among `layers`, by the consumer's name.

    Raises UsageError when the model has none, or when `width` does not divide an MLP's hidden features.
    """
    found: dict[str, Coupling] = {}
    for pattern in patterns:
        kin = [one for name, module in model.named_modules() if (one := _coupling(name, module, pattern, width))]
        kin = [one for one in kin if one.producer in layers and one.consumer in layers]
        if not kin:
            raise UsageError(
                f"prune.patterns: {pattern}: no module of this model can lose {pattern} as a whole",
                "it takes timm's Mlp, Attention or WindowAttention, both layers in prune.layers; leave the pattern out",
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
    if pattern == "neurons" and isinstance(module, Mlp) and isinstance(module.norm, nn.Identity):
        if not isinstance(module.fc2, nn.Linear):  # a convolution of 1 x 1
            return None
        return Coupling(name, f"{name}.fc1", f"{name}.fc2", width, 1, module.fc2.out_features)
    if pattern == "heads" and (
        isinstance(module, WindowAttention)
        or (isinstance(module, Attention) and isinstance(module.norm, nn.Identity) and hasattr(module, "attn_dim"))
    ):
        if getattr(module, "gate", None) is not None or module.qkv.out_features != 3 * module.proj.in_features:
            return None
        head = module.proj.in_features // module.num_heads
        return Coupling(name, f"{name}.qkv", f"{name}.proj", head, 3, module.proj.out_features)
    return None
