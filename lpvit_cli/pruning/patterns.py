"""Removals that leave no zeros behind: hidden neurons and attention heads go from all layers that hold them.

Both are pairs of linear layers: only `consumer` reads the outputs of `producer`. Pruning columns of the consumer, its kept
weights making up for them, frees the producer's rows: the pair is decided on the consumer and saves what both cost.
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
class Pair:
    """Groups of `width` features between two layers. `repeats`: places of a group in the producer's rows (q, k and v)."""

    module: str
    producer: str
    consumer: str
    width: int
    repeats: int
    consumer_out: int

    @property
    def block(self) -> Block:
        """What goes from the consumer with a group: its whole columns."""
        return self.consumer_out, self.width

    def kept(self, mask: Tensor) -> Tensor:
        """What `narrow` is to keep, by index: heads, or single neurons."""
        groups = mask[0].nonzero()[:, 0]
        return groups if self.repeats == 3 else (groups[:, None] * self.width + torch.arange(self.width)).flatten()

    def producer_mask(self, mask: Tensor) -> Tensor:
        """Block mask [repeats * groups, 1] of the producer, blocks of `width` rows, for one [1, groups] of the consumer."""
        return mask.T.repeat(self.repeats, 1)


def find_pairs(model: nn.Module, layers: dict[str, nn.Linear], patterns: Iterable[str], width: int) -> dict[str, Pair]:
    """The pairs of `neurons` (in groups of `width`) and `heads` among `layers`, by the consumer's name.

    Raises UsageError when the model has none, or when `width` does not divide an MLP's hidden features.
    """
    found: dict[str, Pair] = {}
    for pattern in patterns:
        kin = [pair for name, module in model.named_modules() if (pair := _pair(name, module, pattern, width))]
        kin = [pair for pair in kin if pair.producer in layers and pair.consumer in layers]
        if not kin:
            raise UsageError(
                f"prune.patterns: {pattern}: no module of this model can lose {pattern} as a whole",
                "it takes timm's Mlp, Attention or WindowAttention, both layers in prune.layers; leave the pattern out",
            )
        for pair in kin:
            features = layers[pair.consumer].in_features
            if features % pair.width:
                raise UsageError(
                    f"prune.patterns: neurons: groups of {pair.width} do not divide the {features} of {pair.consumer}",
                    "choose a block width (the second number of prune.block) that does",
                )
            found[pair.consumer] = pair
    return found


def _pair(name: str, module: nn.Module, pattern: str, width: int) -> Pair | None:
    if pattern == "neurons" and isinstance(module, Mlp) and isinstance(module.norm, nn.Identity):
        if not isinstance(module.fc2, nn.Linear):  # a convolution of 1 x 1
            return None
        return Pair(name, f"{name}.fc1", f"{name}.fc2", width, 1, module.fc2.out_features)
    if pattern == "heads" and (
        isinstance(module, WindowAttention)
        or (isinstance(module, Attention) and isinstance(module.norm, nn.Identity) and hasattr(module, "attn_dim"))
    ):
        if getattr(module, "gate", None) is not None or module.qkv.out_features != 3 * module.proj.in_features:
            return None
        head = module.proj.in_features // module.num_heads
        return Pair(name, f"{name}.qkv", f"{name}.proj", head, 3, module.proj.out_features)
    return None
