"""What removing blocks of a layer costs: a score that orders them, and the layer's distortion along that order.

Each method is one function `(weight [out, in], statistics, block) -> Removal`; the very order a curve was made of is the
order the mask is made of. `taylor`, `lpvit` and `obs` give distortions in units of the per-image loss: layers compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lpvit_cli.curvature import LayerStatistics
from lpvit_cli.pruning.blocks import Block, block_sums, grid
from lpvit_cli.pruning.surgeon import merged, removal_order


@dataclass(frozen=True)
class Removal:
    """One layer's removal order and its price; `unit` blocks go at a time."""

    order: Tensor  # [steps * unit] int64: flat block indices, the first to go first
    distortion: Tensor  # [steps + 1] float64: D after the first k removals; D[0] = 0
    grid: tuple[int, int]
    unit: int = 1

    @classmethod
    def greedy(cls, order: Tensor, errors: Tensor, balanced: bool = False) -> Removal:
        """From the greedy order of each block row, block columns and errors [rows, cols]: one at a time over the whole layer,
        or `balanced`, one from every block row at a time."""
        rows, cols = order.shape
        if balanced:
            flat = (order + cols * torch.arange(rows)[:, None]).T.flatten()
            return cls(flat, _cumulative(errors.sum(dim=0)), (rows, cols), unit=rows)
        flat, steps = merged(order, errors)
        return cls(flat, _cumulative(steps), (rows, cols))

    @property
    def steps(self) -> int:
        return len(self.order) // self.unit

    def mask(self, removed: int) -> Tensor:
        """Block mask (True: kept) [rows, cols] after the first `removed` removals."""
        mask = torch.ones(len(self.order), dtype=torch.bool)
        mask[self.order[: removed * self.unit]] = False
        return mask.reshape(self.grid)

    def along(self, cost: Tensor) -> Tensor:
        """Cost kept after 0, 1 ... removals [steps + 1], given the cost of each block [rows, cols]."""
        return cost.sum() - _cumulative(cost.flatten()[self.order].unflatten(0, (-1, self.unit)).sum(dim=1))


def magnitude(weight: Tensor, statistics: LayerStatistics, block: Block) -> Removal:
    """Squared Frobenius norm of each block; no data used."""
    return additive(block_sums(weight.double().square(), block))


def taylor(weight: Tensor, statistics: LayerStatistics, block: Block) -> Removal:
    """First-order change of the loss, |sum over the block of g w| (Molchanov et al., CVPR 2019, arXiv 1906.10771)."""
    return additive(_first_order(weight, statistics, block))


def wanda(weight: Tensor, statistics: LayerStatistics, block: Block) -> Removal:
    """Sum of |w| times the norm of its input (Wanda, arXiv 2306.11695), over each block. Not in units of loss."""
    norms = statistics.input_outer.diagonal().double().sqrt()
    return additive(block_sums(weight.double().abs() * norms, block))


def lpvit(weight: Tensor, statistics: LayerStatistics, block: Block) -> Removal:
    """LPViT (arXiv 2407.02068): blocks ordered by the Taylor score, distortion to second order along that order,
    D = sum |g w| + 1/2 d^T F d, d the weights removed so far, F the layer's Fisher block.

    F is Kronecker-factored as in K-FAC (arXiv 1503.05671), its output factor reduced to the diagonal: for output r,
    F_r = T S_r (H / 2), T tokens an image. A removal adds 1/2 (2 d - dd)^T F dd, cross terms with earlier ones included.
    """
    first = _first_order(weight, statistics, block)
    order = _ascending(first)
    pairs = _second_order(weight, statistics, block)  # [rows, cols, cols]
    rows, cols = first.shape
    rank = torch.empty(rows * cols, dtype=torch.int64)
    rank[order] = torch.arange(rows * cols)
    rank = rank.reshape(rows, cols)
    earlier = rank[:, None, :] < rank[:, :, None]  # [row, j, i]: i goes before j
    second = 0.5 * pairs.diagonal(dim1=1, dim2=2) + (pairs * earlier).sum(dim=2)
    return Removal(order, _cumulative((first + second).flatten()[order]), (rows, cols))


def obs(weight: Tensor, statistics: LayerStatistics, block: Block, balanced: bool = False) -> Removal:
    """Exact greedy removal with compensation (surgeon.py), errors of the outputs weighted by T S: units of loss."""
    found = removal_order(weight, statistics.hessian / 2, block, statistics.loss_weights)
    return Removal.greedy(*found, balanced)


METHODS: dict[str, Callable[[Tensor, LayerStatistics, Block], Removal]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "taylor": taylor,
    "lpvit": lpvit,
    "obs": obs,
}


def _first_order(weight: Tensor, statistics: LayerStatistics, block: Block) -> Tensor:
    return block_sums(statistics.mean_gradient.double() * weight.double(), block).abs()


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


def _ascending(score: Tensor) -> Tensor:
    return score.flatten().argsort(stable=True)


def additive(score: Tensor) -> Removal:
    """Blocks in ascending order of a score [rows, cols] that adds up over blocks."""
    order = _ascending(score)
    return Removal(order, _cumulative(score.flatten()[order]), (score.shape[0], score.shape[1]))


def _cumulative(steps: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.float64), steps.double().cumsum(0)])
