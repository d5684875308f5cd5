"""How many blocks each layer loses: minimise sum_l D_l + beta P_l under a budget on the kept cost (METHOD: LPViT's objective).

For a multiplier the problem separates by layer, so the solution walks the lower convex hulls of the layers' curves in order
of slope and stops as soon as the budget is met. Whole hull segments are exact Lagrangian solutions; the last one is cut where
the budget is met, within one block. Where a layer has several curves (block shapes), its hull is that of all their points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from torch import Tensor

from lpvit_cli.errors import UsageError


@dataclass(frozen=True)
class Curve:
    """One layer along its removal order; all [n + 1] float64, entry k after k removals."""

    distortion: Tensor
    energy: Tensor  # predicted, falling; any unit
    kept_cost: Tensor  # what the budget counts; falls in the end, a measured one not at every step
    most_removals: int  # min_keep allows no more


class CurvePoint(NamedTuple):
    """Where a layer ends: which of its curves, and how many removals along it."""

    curve: int
    removed: int


class _Point(NamedTuple):
    saved: float
    price: float
    at: CurvePoint


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


def automatic_beta(curves: Mapping[str, Sequence[Curve]]) -> float:
    """The paper's scale: mean over layers of max D' over mean of max |P'|, by removed fraction, on the convex hulls: a measured
    energy jumps where a layer stops being dense, which no removal alone is worth."""
    steepest_d, steepest_p = 0.0, 0.0
    for curve in (curve for options in curves.values() for curve in options):
        blocks = len(curve.energy) - 1
        steepest_d += blocks * max(_slopes(curve.distortion[: curve.most_removals + 1]), default=0.0)
        steepest_p += blocks * max(0.0, *(-slope for slope in _slopes(curve.energy)))
    return max(0.0, steepest_d) / (steepest_p or 1.0)


def _slopes(costs: Tensor) -> list[float]:
    """Of the lower convex hull, a removal each."""
    y = costs.tolist()
    return [(y[b] - y[a]) / (b - a) for a, b in pairwise(lower_hull(list(range(len(y))), y))]


def allocate(
    curves: Mapping[str, Sequence[Curve]], budget: float, beta: float | Literal["auto"] = "auto"
) -> dict[str, CurvePoint]:
    """Removals per layer so that the kept cost, summed over layers, is at most `budget`, and no more than one block below.

    All curves of a layer start at the same cost. Raises UsageError when min_keep makes the budget impossible.
    """
    if beta == "auto":
        beta = automatic_beta(curves)
    points = {name: _points(options, beta) for name, options in curves.items()}
    cost = sum(float(options[0].kept_cost[0]) for options in curves.values())
    lowest = cost - sum(layer[-1].saved for layer in points.values())
    allowed = budget * (1 + 1e-9)
    if lowest > allowed:
        raise UsageError(
            f"prune.budget: impossible: with min_keep the prunable layers keep at least {lowest / cost:.1%} of their cost, "
            f"the budget leaves them {max(0.0, budget / cost):.1%}",
            "raise the budget, lower prune.min_keep, or include more layers",
        )
    segments = []
    for name, layer in points.items():
        hull = lower_hull([p.saved for p in layer], [p.price for p in layer])
        slope = -math.inf
        for a, b in pairwise(hull):  # slopes ascend along a hull; rounding must not reorder equal ones
            slope = max(slope, (layer[b].price - layer[a].price) / (layer[b].saved - layer[a].saved))
            segments.append((slope, name, a, b))
    chosen = {name: layer[0].at for name, layer in points.items()}
    for _, name, a, b in sorted(segments, key=lambda s: s[0]):
        if cost <= allowed:
            break
        layer = points[name]
        nearest: dict[int, _Point] = {}  # of each curve, the first point that meets the budget
        for point in layer[a + 1 : b + 1]:
            if cost - (point.saved - layer[a].saved) <= allowed:
                nearest.setdefault(point.at.curve, point)
        end = min(nearest.values(), key=lambda p: p.price, default=layer[b])
        chosen[name] = end.at
        cost -= end.saved - layer[a].saved
    return chosen


def _points(options: Sequence[Curve], beta: float) -> list[_Point]:
    """All that a layer may become, by strictly ascending saving; of equal savings the cheapest."""
    found = []
    for index, curve in enumerate(options):
        last = curve.most_removals + 1
        saved = (curve.kept_cost[0] - curve.kept_cost[:last]).tolist()
        price = (curve.distortion[:last] + beta * curve.energy[:last]).tolist()
        found += [_Point(s, p, CurvePoint(index, k)) for k, (s, p) in enumerate(zip(saved, price, strict=True))]
    start, *others = found
    points = [start]
    for point in sorted((p for p in others if p.saved > 0), key=lambda p: (p.saved, p.price)):
        if point.saved > points[-1].saved:
            points.append(point)
    return points
