"""lpvit: LPViT's curves, as the paper describes them."""

from __future__ import annotations

import torch
from torch import Tensor

from lpvit_cli.curvature import LayerStatistics
from lpvit_cli.pruning.blocks import Block, block_sums, grid
from lpvit_cli.pruning.methods.base import Method
from lpvit_cli.pruning.methods.taylor import first_order
from lpvit_cli.pruning.removal import Removal, ascending, cumulative


class Lpvit(Method):
    def removal(self, layer: str, block: Block, balanced: bool) -> Removal:
        return lpvit(self.plan.weight(layer), self.plan.statistics[layer], block)


def lpvit(weight: Tensor, statistics: LayerStatistics, block: Block) -> Removal:
    """LPViT (arXiv 2407.02068): blocks ordered by the Taylor score, distortion to second order along that order,
    D = sum |g w| + 1/2 d^T F d, d the weights removed so far, F the layer's Fisher block.

    F is Kronecker-factored as in K-FAC (arXiv 1503.05671), its output factor reduced to the diagonal: for output r,
    F_r = T S_r (H / 2), T tokens an image. A removal adds 1/2 (2 d - dd)^T F dd, cross terms with earlier ones included.
    """
    first = first_order(weight, statistics, block)
    order = ascending(first)
    pairs = _second_order(weight, statistics, block)  # [rows, cols, cols]
    rows, cols = first.shape
    rank = torch.empty(rows * cols, dtype=torch.int64)
    rank[order] = torch.arange(rows * cols)
    rank = rank.reshape(rows, cols)
    earlier = rank[:, None, :] < rank[:, :, None]  # [row, j, i]: i goes before j
    second = 0.5 * pairs.diagonal(dim1=1, dim2=2) + (pairs * earlier).sum(dim=2)
    return Removal(order, cumulative((first + second).flatten()[order]), (rows, cols))


def _second_order(weight: Tensor, statistics: LayerStatistics, block: Block) -> Tensor:
    """w_j^T F w_i for blocks i, j of one block row: [rows, cols, cols] float64. Blocks of different rows do not interact."""
    out, columns = weight.shape
    rows, cols = grid((out, columns), block)
    fisher_in = statistics.hessian.to(weight) / 2  # [in, in]
    scale = statistics.loss_weights.diagonal().to(weight)  # [out]
    weighted = scale[:, None] * weight
    pairs = torch.empty(rows, cols, cols, dtype=torch.float64)
    for j in range(cols):
        at = slice(j * block[1], (j + 1) * block[1])
        pairs[:, j] = block_sums((weighted[:, at] @ fisher_in[at]).mul_(weight), block)
    return pairs
