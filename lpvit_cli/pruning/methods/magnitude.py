"""magnitude: blocks by their squared norm."""

from __future__ import annotations

from torch import Tensor

from lpvit_cli.pruning.blocks import Block, block_sums
from lpvit_cli.pruning.methods.base import Method
from lpvit_cli.pruning.removal import Removal, additive


class Magnitude(Method):
    def removal(self, layer: str, block: Block, balanced: bool) -> Removal:
        return magnitude(self.plan.weight(layer), block)


def magnitude(weight: Tensor, block: Block) -> Removal:
    """Squared Frobenius norm of each block of `weight` [out, in]; no data used."""
    return additive(block_sums(weight.double().square(), block))
