"""The order in which the blocks of a layer go, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpvit_cli.pruning.block_obs import merged


@dataclass(frozen=True)
class Removal:
    """One layer's removal order and its price; `unit` blocks go at a time."""

    order: Tensor  # [steps * unit] int64: flat block indices, the first to go first
    distortion: Tensor  # [steps + 1] float64: D after the first k removals; D[0] = 0
    grid: tuple[int, int]
    unit: int = 1
    by_row: tuple[Tensor, Tensor] | None = None  # of a greedy search: order and errors of each block row [rows, cols]

    @classmethod
    def greedy(cls, order: Tensor, errors: Tensor, balanced: bool = False) -> Removal:
        """From the greedy order of each block row, block columns and errors [rows, cols]: one at a time over the whole layer,
        or `balanced`, one from every block row at a time."""
        rows, cols = order.shape
        if balanced:
            flat = (order + cols * torch.arange(rows)[:, None]).T.flatten()
            return cls(flat, cumulative(errors.sum(dim=0)), (rows, cols), unit=rows, by_row=(order, errors))
        flat, steps = merged(order, errors)
        return cls(flat, cumulative(steps), (rows, cols), by_row=(order, errors))

    @property
    def steps(self) -> int:
        return len(self.order) // self.unit

    @property
    def kept_fractions(self) -> Tensor:
        """The fraction of blocks that is left after 0, 1 ... removals [steps + 1] float64."""
        return self.along(torch.ones(self.grid, dtype=torch.float64)) / len(self.order)

    def mask(self, removed: int) -> Tensor:
        """Block mask (True: kept) [rows, cols] after the first `removed` removals."""
        mask = torch.ones(len(self.order), dtype=torch.bool)
        mask[self.order[: removed * self.unit]] = False
        return mask.reshape(self.grid)

    def along(self, cost: Tensor) -> Tensor:
        """Cost kept after 0, 1 ... removals [steps + 1], given the cost of each block [rows, cols]."""
        return cost.sum() - cumulative(cost.flatten()[self.order].unflatten(0, (-1, self.unit)).sum(dim=1))


def additive(score: Tensor) -> Removal:
    """Blocks in ascending order of a score [rows, cols] that adds up over blocks."""
    order = ascending(score)
    return Removal(order, cumulative(score.flatten()[order]), (score.shape[0], score.shape[1]))


def ascending(score: Tensor) -> Tensor:
    """Flat block indices, the smallest score first."""
    return score.flatten().argsort(stable=True)


def cumulative(steps: Tensor) -> Tensor:
    """The sum of no, one, two ... of the steps, in float64."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), steps.double().cumsum(0)])
