"""The promise of recovery: no removed block comes back."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from lpvit_cli.errors import CheckFailed
from lpvit_cli.sparse import sparse_layers


def block_masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.block_mask.cpu() for name, layer in sparse_layers(model).items()}


def require_same_masks(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """The promise of this stage, checked on what was written: no removed block has come back."""
    changed = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
    if changed or before.keys() != after.keys():
        raise CheckFailed(
            f"zero blocks were filled in {changed[0] if changed else 'new layers'}", "please report this as a bug"
        )


def require_nested(masks: list[dict[str, Tensor]]) -> None:
    """What a step has removed is removed in the next one too. `masks` [out/R, in/C] by layer, step by step."""
    for before, after in pairwise(masks):
        for name, mask in before.items():
            # a layer that keeps all its blocks is one block
            back = not mask.all() and (after[name].shape != mask.shape or bool((after[name] & ~mask).any()))
            if back:
                raise CheckFailed(
                    f"schedule: removed blocks of {name} came back in a later step", "please report this as a bug"
                )
