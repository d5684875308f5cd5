"""taylor: blocks by the first-order change of the loss."""

from __future__ import annotations

from torch import Tensor

from lpvit_cli.curvature import LayerStatistics
from lpvit_cli.pruning.blocks import Block, block_sums
from lpvit_cli.pruning.methods.base import Method
from lpvit_cli.pruning.removal import Removal, additive


class Taylor(Method):
    def removal(self, layer: str, block: Block, balanced: bool) -> Removal:
        return taylor(self.plan.weight(layer), self.plan.statistics[layer], block)


def taylor(weight: Tensor, statistics: LayerStatistics, block: Block) -> Removal:
    """First-order change of the loss, |sum over the block of g w| (Molchanov et al., CVPR 2019, arXiv 1906.10771)."""
    return additive(first_order(weight, statistics, block))


def first_order(weight: Tensor, statistics: LayerStatistics, block: Block) -> Tensor:
    """|sum over the block of g w| [rows, cols] float64, in units of the per-image loss."""
    return block_sums(statistics.mean_gradient.double() * weight.double(), block).abs()
