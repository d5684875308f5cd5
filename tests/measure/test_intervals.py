"""Percentiles against numpy's definition by hand; the interval of a ratio against simulated experiments."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpvit_cli.measure.statistics import coefficient_of_variation, paired_ratio, percentiles, unpaired_ratio

times = st.lists(st.floats(0.1, 100), min_size=6, max_size=40)


def test_percentiles_interpolate_between_neighbours() -> None:
    p = percentiles([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (p.p10, p.p50, p.p90, p.p95, p.p99) == pytest.approx((1.4, 3.0, 4.6, 4.8, 4.96))


def test_coefficient_of_variation_has_no_unit() -> None:
    samples = [9.0, 10.0, 11.0] * 100
    assert coefficient_of_variation(samples) == pytest.approx(math.sqrt(2 / 3) / 10, rel=0.01)
    assert coefficient_of_variation([1000 * s for s in samples]) == pytest.approx(coefficient_of_variation(samples))


@pytest.mark.parametrize("pairs", [6, 30])
def test_interval_covers_the_true_ratio_in_95_of_100_experiments(pairs: int) -> None:
    """Both subjects share a log-normal drift per round and have log-normal noise of their own; the true ratio is 1.3."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        drift = generator.lognormal(0, 0.3, pairs)
        dense = 1.3 * drift * generator.lognormal(0, 0.05, pairs)
        sparse = drift * generator.lognormal(0, 0.05, pairs)
        ratio = paired_ratio(dense.tolist(), sparse.tolist())
        covered += ratio.low <= 1.3 <= ratio.high
    # 1,000 draws at 95 % have a standard deviation of 0.7 %
    assert 930 <= covered <= 970


def test_outliers_in_one_round_of_ten_hardly_move_the_ratio() -> None:
    generator = np.random.default_rng(1)
    dense, sparse = 1.3 * generator.lognormal(0, 0.01, 30), generator.lognormal(0, 0.01, 30)
    sparse[[3, 14, 25]] *= 50
    ratio = paired_ratio(dense.tolist(), sparse.tolist())
    assert ratio.value == pytest.approx(1.3, rel=0.01)
    assert ratio.high / ratio.low < 1.03


@given(times)
def test_a_subject_is_as_fast_as_itself_and_a_factor_is_found_exactly(samples: list[float]) -> None:
    ratio = paired_ratio([2 * s for s in samples], samples)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((2, 2, 2))


@given(times, st.randoms())
def test_swapping_baseline_and_subject_inverts_the_interval(samples: list[float], random) -> None:  # type: ignore[no-untyped-def]
    other = [s * random.uniform(0.5, 2) for s in samples]
    there, back = paired_ratio(samples, other), paired_ratio(other, samples)
    assert there.low <= there.value <= there.high
    assert (back.low, back.high) == pytest.approx((1 / there.high, 1 / there.low))


def test_too_few_or_unequal_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs"):
        paired_ratio([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="pairs"):
        paired_ratio([1.0] * 8, [1.0] * 9)
    with pytest.raises(ValueError, match="needs at least 6 pairs, got 5 and 5"):
        paired_ratio([1.0] * 5, [1.0] * 5)
    ratio = paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6)
    assert (ratio.low, ratio.value, ratio.high) == (1.0, 3.5, 6.0)


def test_unpaired_interval_holds_a_known_factor_in_19_of_20_cases() -> None:
    """A factor of 1.1 on skewed times, 400 experiments: 380 are expected, with a standard deviation of 4.4."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        before, after = np.exp(generator.gumbel(0, 0.05, (2, 15)))
        ratio = unpaired_ratio(list(1.1 * before), list(after))
        held += ratio.low <= 1.1 <= ratio.high
    assert 366 <= held <= 400


def test_unpaired_ratio_of_the_smallest_samples_by_hand() -> None:
    """n = m = 6: floor(18 - 1.96 sqrt(36 * 13 / 12)) = 5, so the 5th smallest and 5th largest of the 36 ratios."""
    before, after = [2.0, 4.0, 8.0, 16.0, 32.0, 64.0], [1.0, 1.01, 1.02, 1.03, 1.04, 1.05]
    ratios = sorted(a / b for a in before for b in after)
    ratio = unpaired_ratio(before, after)
    assert (ratio.low, ratio.high) == (ratios[4], ratios[-5])
    assert ratio.value == pytest.approx((ratios[17] + ratios[18]) / 2)
    swapped = unpaired_ratio(after, before)
    assert (1 / swapped.high, 1 / swapped.low) == pytest.approx((ratio.low, ratio.high))
    with pytest.raises(ValueError, match="at least 6"):
        unpaired_ratio(before[:5], after)
