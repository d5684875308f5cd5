"""A power model of a device: picojoules a multiply-add, picojoules a byte moved, and watts whatever is done.

A call takes e_mac * MACs + e_byte * bytes + static power * seconds. The three are fitted to calls whose energy was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

from lpvit_cli.errors import UsageError
from lpvit_cli.measure.statistics import CONFIDENCE

TERMS = ("multiply-adds", "bytes", "seconds")
FEWEST_POINTS = 6  # twice as many as terms
WORST_CONDITION = 1000.0  # of the terms, each scaled to length one: there 0.1 % of error in joules is all of a term
DRAWS = 4000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Work:
    """What a call executes: multiply-adds, and the bytes of weights, read once, and of what its modules take and give."""

    macs: int
    moved_bytes: int


@dataclass(frozen=True)
class Point:
    """One call whose energy was measured."""

    work: Work
    seconds: float
    joules: float


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PowerModel:
    """`median_error`, `largest_error`: relative, of the fit at its own `points`."""

    e_mac_pj: Estimate
    e_byte_pj: Estimate
    static_w: Estimate  # of the busy device: more than it draws when it is idle
    points: int
    median_error: float
    largest_error: float

    def joules(self, work: Work, seconds: float) -> float:
        dynamic_pj = self.e_mac_pj.value * work.macs + self.e_byte_pj.value * work.moved_bytes
        return 1e-12 * dynamic_pj + self.static_w.value * seconds


def fit_power(points: Sequence[Point], seed: int = 0) -> PowerModel:
    """Non-negative least squares of relative errors. Intervals are those of Student's t, cut at zero: quantiles of fits to
    draws of the joules with normal errors, whose variance is drawn too, as the residuals tell it.

    Raises UsageError where the points cannot tell the three terms apart.
    """
    if len(points) < FEWEST_POINTS:
        raise UsageError(
            f"a power model needs {FEWEST_POINTS} measured calls, these runs have {len(points)}",
            "bench more batch sizes (bench.batch_sizes) and sparsities",
        )
    terms = np.array([(point.work.macs * 1e-12, point.work.moved_bytes * 1e-12, point.seconds) for point in points])
    joules = np.array([point.joules for point in points])
    relative = terms / joules[:, None]
    condition = np.linalg.cond(relative / np.linalg.norm(relative, axis=0))
    if condition > WORST_CONDITION:
        raise UsageError(
            f"these runs cannot tell {TERMS[0]}, {TERMS[1]} and {TERMS[2]} apart: they rise together "
            f"(condition number {condition:.0f})",
            "bench other batch sizes (bench.batch_sizes) and sparsities too",
        )
    found = _least_squares(relative, np.ones((len(points), 1)))[:, 0]
    fitted = terms @ found
    errors = joules / fitted - 1
    freedom = len(points) - int((found > 0).sum())
    generator = np.random.default_rng(seed)
    spread = np.sqrt((errors**2).sum() / generator.chisquare(freedom, DRAWS))
    drawn = _least_squares(terms / fitted[:, None], 1 + spread * generator.standard_normal((len(points), DRAWS)))
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=1)
    e_mac, e_byte, static = (Estimate(*map(float, numbers)) for numbers in zip(found, low, high, strict=True))
    return PowerModel(
        e_mac_pj=e_mac,
        e_byte_pj=e_byte,
        static_w=static,
        points=len(points),
        median_error=float(np.median(np.abs(errors))),
        largest_error=float(np.abs(errors).max()),
    )


def _least_squares(terms: Array, targets: Array) -> Array:
    """terms [n, k], targets [n, draws] -> coefficients [k, draws] >= 0 of least squares.

    With so few terms the active sets can all be tried: of those whose own solution is not negative, the best is the solution.
    """
    scale = np.linalg.norm(terms, axis=0)
    terms = terms / scale
    count, draws = terms.shape[1], targets.shape[1]
    best, least = np.zeros((count, draws)), (targets**2).sum(axis=0)
    for active in chain.from_iterable(combinations(range(count), size) for size in range(1, count + 1)):
        own = np.linalg.lstsq(terms[:, active], targets, rcond=None)[0]
        missed = ((targets - terms[:, active] @ own) ** 2).sum(axis=0)
        better = (own >= 0).all(axis=0) & (missed < least)
        least[better] = missed[better]
        best[:, better] = 0
        best[np.ix_(active, better)] = own[:, better]
    return best / scale[:, None]
