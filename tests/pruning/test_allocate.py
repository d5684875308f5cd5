"""Allocation against brute force and against the Lagrangian conditions."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpvit_cli.errors import UsageError
from lpvit_cli.pruning.allocate import Curve, allocate, automatic_beta, lower_hull


def curve(steps: list[float], cost: float = 1.0, energy: float = 1.0, keep: int = 0) -> Curve:
    n = len(steps)
    falling = torch.arange(n, -1, -1, dtype=torch.float64)
    distortion = torch.cat([torch.zeros(1), torch.tensor(steps, dtype=torch.float64).cumsum(0)]).double()
    return Curve(distortion, energy * falling, cost * falling, most_removals=n - keep)


def total(curves: dict[str, Curve], removals: dict[str, int], field: str) -> float:
    return sum(float(getattr(c, field)[removals[name]]) for name, c in curves.items())


steps = st.lists(st.floats(0.0, 10.0), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, min_size=1, max_size=3), st.floats(0.0, 1.0), st.floats(0.0, 3.0))
def test_convex_curves_are_solved_exactly(layers: list[list[float]], fraction: float, beta: float) -> None:
    """For convex curves of unit cost, walking the hulls is the optimum; brute force over all allocations agrees."""
    curves = {str(i): curve(sorted(layer), energy=1.0 + i) for i, layer in enumerate(layers)}
    budget = fraction * sum(len(layer) for layer in layers)
    found = allocate(curves, budget, beta)

    def objective(removals: dict[str, int]) -> float:
        return total(curves, removals, "distortion") + beta * total(curves, removals, "energy")

    assert total(curves, found, "kept_cost") <= budget + 1e-6
    # the walk stops as soon as the budget is met, so compare with allocations of the same cost
    same_cost = total(curves, found, "kept_cost")
    best = min(
        objective(choice)
        for ks in product(*(range(len(layer) + 1) for layer in layers))
        if abs(total(curves, choice := dict(zip(curves, ks, strict=True)), "kept_cost") - same_cost) < 1e-9
    )
    assert objective(found) <= best + 1e-6


@settings(max_examples=100, deadline=None)
@given(st.lists(steps, min_size=1, max_size=4), st.lists(st.floats(0.5, 4.0), min_size=4, max_size=4), st.floats(0.0, 1.0))
def test_budget_met_within_one_block(layers: list[list[float]], costs: list[float], fraction: float) -> None:
    curves = {str(i): curve(layer, cost=costs[i]) for i, layer in enumerate(layers)}
    whole = sum(float(c.kept_cost[0]) for c in curves.values())
    found = allocate(curves, fraction * whole)
    kept = total(curves, found, "kept_cost")
    assert kept <= fraction * whole * (1 + 1e-9) + 1e-9
    assert kept > fraction * whole - max(costs[: len(layers)]) - 1e-6


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_hull_is_convex_and_below_every_point(y: list[float]) -> None:
    hull = lower_hull(list(range(len(y))), y)
    assert hull[0] == 0
    assert hull[-1] == len(y) - 1
    slopes = [(y[b] - y[a]) / (b - a) for a, b in pairwise(hull)]
    assert all(s <= t + 1e-9 for s, t in pairwise(slopes))
    for a, b in pairwise(hull):
        for k in range(a, b):
            assert y[k] >= y[a] + (y[b] - y[a]) * (k - a) / (b - a) - 1e-9


def test_more_power_means_more_removals() -> None:
    """The power term falls as blocks go: with beta, the layer that burns more per block loses more of them."""
    curves = {"thrifty": curve([1.0] * 10, energy=1.0), "hungry": curve([1.1] * 10, energy=5.0)}
    assert allocate(curves, 10, beta=0.0) == {"thrifty": 10, "hungry": 0}
    assert allocate(curves, 10, beta=1.0) == {"thrifty": 0, "hungry": 10}


def test_min_keep_bounds_every_layer_and_can_make_a_budget_impossible() -> None:
    curves = {"a": curve([0.0] * 10, keep=2), "b": curve([9.0] * 10, keep=2)}
    assert allocate(curves, 4.0) == {"a": 8, "b": 8}
    assert allocate(curves, 12.0) == {"a": 8, "b": 0}
    with pytest.raises(UsageError, match=r"keep at least 20.0% of their cost, the budget leaves them 15.0%"):
        allocate(curves, 3.0)


def test_automatic_beta_balances_the_steepest_slopes() -> None:
    """mean max D' / mean max |P'|, both by removed fraction: (4 * 4 + 2 * 2) / (4 * 3 + 2 * 5)."""
    curves = {"a": curve([1, 2, 3, 4], energy=3.0), "b": curve([1, 2], energy=5.0)}
    assert automatic_beta(curves) == pytest.approx(20 / 22)
