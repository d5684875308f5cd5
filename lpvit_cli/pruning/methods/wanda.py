"""wanda: blocks by the size of their weights times that of their inputs."""

from __future__ import annotations

from torch import Tensor

from lpvit_cli.curvature import LayerStatistics
from lpvit_cli.pruning.blocks import Block, block_sums
from lpvit_cli.pruning.methods.base import Method
from lpvit_cli.pruning.removal import Removal, additive


class Wanda(Method):
    def removal(self, layer: str, block: Block, balanced: bool) -> Removal:
        return wanda(self.plan.weight(layer), self.plan.statistics[layer], block)


def wanda(weight: Tensor, statistics: LayerStatistics, block: Block) -> Removal:
    """Sum of |w| times the norm of its input (Wanda, arXiv 2306.11695), over each block. Not in units of loss."""
    norms = statistics.A.diagonal().double().sqrt()
    return additive(block_sums(weight.double().abs() * norms, block))
