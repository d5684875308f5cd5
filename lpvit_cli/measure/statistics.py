"""Percentiles, and ratios with an interval one can trust on a noisy machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
FEWEST_PAIRS = 6  # with fewer, not even [smallest, largest] holds the median with 95 % confidence


@dataclass(frozen=True)
class Percentiles:
    """In the unit of the samples."""

    p10: float
    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Ratio:
    """A ratio and its 95 % interval."""

    value: float
    low: float
    high: float


def percentiles(samples: Sequence[float]) -> Percentiles:
    return Percentiles(*(float(p) for p in np.percentile(samples, (10, 50, 90, 95, 99))))


def quantiles(samples: Sequence[float]) -> list[float]:
    """The 0th, 1st ... 100th percentile, in the unit of the samples: the whole distribution in 101 numbers."""
    return [float(q) for q in np.percentile(samples, range(101))]


def coefficient_of_variation(samples: Sequence[float]) -> float:
    """Standard deviation over mean."""
    return float(np.std(samples) / np.mean(samples))


def paired_ratio(baseline: Sequence[float], subject: Sequence[float]) -> Ratio:
    """Median of baseline_i / subject_i with its distribution-free 95 % interval, from the order statistics: the k-th
    smallest and k-th largest ratio hold the true median with probability 1 - 2 P(Binomial(n, 1/2) < k) (Conover,
    Practical Nonparametric Statistics, 3.2). Outliers, however wild, do not move it. Raises ValueError below 6 pairs.
    """
    n = len(baseline)
    if n != len(subject) or n < FEWEST_PAIRS:
        raise ValueError(f"needs at least {FEWEST_PAIRS} pairs, got {n} and {len(subject)}")
    ratios = sorted(a / b for a, b in zip(baseline, subject, strict=True))
    tail, k = 0.0, 0
    while 2 * (tail := tail + math.comb(n, k) / 2**n) <= 1 - CONFIDENCE:
        k += 1
    return Ratio(float(np.median(ratios)), ratios[k - 1], ratios[n - k])


def unpaired_ratio(before: Sequence[float], after: Sequence[float]) -> Ratio:
    """Median of all before_i / after_j with its distribution-free 95 % interval for samples that differ by a factor: order
    statistics at the critical value of Mann and Whitney's U, by its normal approximation (Hollander and Wolfe, Nonparametric
    Statistical Methods, 4.3). Raises ValueError below 6 samples on a side.
    """
    n, m = len(before), len(after)
    if min(n, m) < FEWEST_PAIRS:
        raise ValueError(f"needs at least {FEWEST_PAIRS} samples on each side, got {n} and {m}")
    ratios = sorted(a / b for a in before for b in after)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    k = max(1, math.floor(n * m / 2 - z * math.sqrt(n * m * (n + m + 1) / 12)))
    return Ratio(float(np.median(ratios)), ratios[k - 1], ratios[n * m - k])
