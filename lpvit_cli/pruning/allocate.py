"""How many blocks each layer loses: minimise sum_l D_l + beta P_l under a budget on the kept cost (METHOD: LPViT's objective).

For a multiplier the problem separates by layer, so the solution walks the lower convex hulls of the layers' curves in order
of slope and stops as soon as the budget is met. Whole hull segments are exact Lagrangian solutions; the last one is cut where
the budget is met, within one block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from lpvit_cli.errors import UsageError


@dataclass(frozen=True)
class Curve:
    """One layer along its removal order; all [n + 1] float64, entry k after k removals."""

    distortion: Tensor
    energy: Tensor  # predicted, falling; any unit
    kept_cost: Tensor  # what the budget counts, falling
    most_removals: int  # min_keep allows no more


def lower_hull(x: list[float], y: list[float]) -> list[int]:
    """Indices of the lower convex hull of points whose x ascends strictly (Andrew's monotone chain)."""
    hull: list[int] = []
    for k in range(len(x)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[k] - x[a]) < (y[k] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(k)
    return hull


def automatic_beta(curves: dict[str, Curve]) -> float:
    """The paper's scale: mean over layers of max D' over mean of max |P'|, by removed fraction, D' on the convex hull."""
    steepest_d, steepest_p = 0.0, 0.0
    for curve in curves.values():
        blocks = len(curve.distortion) - 1
        distortion = curve.distortion[: curve.most_removals + 1].tolist()
        hull = lower_hull(list(range(len(distortion))), distortion)
        steepest_d += max(((distortion[b] - distortion[a]) / (b - a) * blocks for a, b in pairwise(hull)), default=0.0)
        steepest_p += float(curve.energy.diff().abs().max()) * blocks
    return max(0.0, steepest_d) / (steepest_p or 1.0)


def allocate(curves: dict[str, Curve], budget: float, beta: float | Literal["auto"] = "auto") -> dict[str, int]:
    """Removals per layer so that the kept cost, summed over layers, is at most `budget`, and no more than one block below.

    Raises UsageError when min_keep makes the budget impossible.
    """
    if beta == "auto":
        beta = automatic_beta(curves)
    cost = sum(float(curve.kept_cost[0]) for curve in curves.values())
    lowest = sum(float(curve.kept_cost[curve.most_removals]) for curve in curves.values())
    if lowest > budget * (1 + 1e-9):
        raise UsageError(
            f"prune.budget: impossible: with min_keep the prunable layers keep at least {lowest / cost:.1%} of their cost, "
            f"the budget leaves them {max(0.0, budget / cost):.1%}",
            "raise the budget, lower prune.min_keep, or include more layers",
        )
    segments = []
    for name, curve in curves.items():
        last = curve.most_removals + 1
        removed = (curve.kept_cost[0] - curve.kept_cost[:last]).tolist()
        price = (curve.distortion[:last] + beta * curve.energy[:last]).tolist()
        hull = lower_hull(removed, price)
        slope = -math.inf
        for a, b in pairwise(hull):  # slopes ascend along a hull; rounding must not reorder equal ones
            slope = max(slope, (price[b] - price[a]) / (removed[b] - removed[a]))
            segments.append((slope, name, a, b))
    removals = dict.fromkeys(curves, 0)
    for _, name, start, end in sorted(segments, key=lambda s: s[0]):
        for k in range(start, end):
            if cost <= budget * (1 + 1e-9):
                return removals
            cost += float(curves[name].kept_cost[k + 1] - curves[name].kept_cost[k])
            removals[name] = k + 1
    return removals
