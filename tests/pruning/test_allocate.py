"""Allocation against brute force and against the Lagrangian conditions."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lpvit_cli.errors import UsageError
from lpvit_cli.pruning import allocate as engine
from lpvit_cli.pruning.allocate import Curve, CurvePoint, lower_hull


def curve(steps: list[float], cost: float = 1.0, energy: float = 1.0, keep: int = 0) -> Curve:
    n = len(steps)
    falling = torch.arange(n, -1, -1, dtype=torch.float64)
    distortion = torch.cat([torch.zeros(1), torch.tensor(steps, dtype=torch.float64).cumsum(0)]).double()
    return Curve(distortion, energy * falling, cost * falling, most_removals=n - keep)


def allocate(curves: dict[str, Curve], budget: float, beta: float | Literal["auto"] = "auto") -> dict[str, int]:
    """Layers with one curve each."""
    choices = engine.allocate({name: [c] for name, c in curves.items()}, budget, beta)
    assert all(choice.curve == 0 for choice in choices.values())
    return {name: choice.removed for name, choice in choices.items()}


def automatic_beta(curves: dict[str, Curve]) -> float:
    return engine.automatic_beta({name: [c] for name, c in curves.items()})


def total(curves: dict[str, Curve], removals: dict[str, int], field: str) -> float:
    return sum(float(getattr(c, field)[removals[name]]) for name, c in curves.items())


steps = st.lists(st.floats(0.0, 10.0), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, min_size=1, max_size=3), st.floats(0.0, 1.0), st.floats(0.0, 3.0))
@example([[4.035291254366876] * 4 + [0.4283508905822454]], 0.0, 0.0)  # equal slopes that rounding puts out of order
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


def test_automatic_beta_is_of_the_hull_of_what_may_be_removed() -> None:
    """Distortions 0 3 4 and then a cliff that min_keep forbids; their hull is one segment of slope 2; 3 blocks of energy 2."""
    forbidden = curve([3, 1, 100], energy=2.0, keep=1)
    assert automatic_beta({"a": forbidden}) == pytest.approx(2 * 3 / (2 * 3))


@pytest.mark.parametrize(
    ("energy", "steepest"),
    [([5.0, 4.0, 0.0], 2.5), ([5.0, 1.0, 0.0], 4.0), ([5.0, 9.0, 2.0], 1.5), ([5.0, 6.0, 5.5], None)],
    ids=["ragged", "the large block first", "sparse costs more until half is gone", "sparse never pays"],
)
def test_automatic_beta_takes_the_steepest_power_that_removals_are_worth(energy: list[float], steepest: float | None) -> None:
    even = curve([2, 2])
    made = Curve(even.distortion, torch.tensor(energy).double(), even.kept_cost, even.most_removals)
    assert automatic_beta({"a": made}) == pytest.approx(2 * 2 / (2 * steepest if steepest else 1))


@pytest.mark.parametrize(
    ("made", "beta"),
    [(curve([-1.0, -2.0]), 0.0), (curve([0.0, 0.0]), 0.0), (curve([3.0], energy=0.0), 3.0), (curve([3.0], keep=1), 0.0)],
    ids=["falling distortion", "no distortion", "no power", "nothing to remove"],
)
def test_automatic_beta_of_degenerate_curves(made: Curve, beta: float) -> None:
    assert automatic_beta({"a": made}) == pytest.approx(beta)
    assert allocate({"a": made}, float(made.kept_cost[0])) == {"a": 0}


def test_automatic_beta_is_what_allocation_uses_by_default() -> None:
    curves = {"thrifty": curve([1.0] * 10, energy=1.0), "hungry": curve([1.1] * 10, energy=5.0)}
    assert allocate(curves, 10) == allocate(curves, 10, automatic_beta(curves)) == {"thrifty": 0, "hungry": 10}


def test_a_removal_is_judged_by_what_it_saves() -> None:
    """Blocks of `large` cost four times as much and distort twice as much: they are the cheaper way to save."""
    curves = {"small": curve([1.0] * 8, cost=1.0), "large": curve([2.0] * 8, cost=4.0)}
    assert allocate(curves, 8.0, beta=0.0) == {"small": 0, "large": 8}


@pytest.mark.parametrize("kept", range(11))
@pytest.mark.parametrize("cost", [0.1, 1 / 3, 0.7])
def test_rounding_neither_costs_a_block_nor_makes_a_budget_impossible(cost: float, kept: int) -> None:
    """Budgets of so many tenths of the cost, each computed in another way than the sums they are compared with."""
    budget = sum([cost] * kept)
    for keep in (0, kept):
        assert allocate({"a": curve([1.0] * 10, cost=cost, keep=keep)}, budget)["a"] == 10 - kept


def shaped(costs: list[float], distortion: list[float]) -> Curve:
    n = len(costs) - 1
    return Curve(torch.tensor(distortion).double(), torch.zeros(n + 1).double(), torch.tensor(costs).double(), n)


def test_of_several_curves_a_layer_takes_the_cheapest_for_its_saving() -> None:
    """`fine` distorts less up to half the cost, `coarse` beyond: a cost that small blocks do not bring further down."""
    fine = shaped([8, 7, 6, 5, 4], [0, 0.5, 1, 1.5, 6])
    coarse = shaped([8, 5, 2], [0, 2, 4])
    for budget, choice in ((7, (0, 1)), (6, (0, 2)), (5, (0, 3)), (4, (1, 2)), (2, (1, 2))):
        assert engine.allocate({"a": [fine, coarse]}, budget, 0.0) == {"a": CurvePoint(*choice)}, budget
        assert engine.allocate({"a": [coarse, fine]}, budget, 0.0) == {"a": CurvePoint(1 - choice[0], choice[1])}, budget


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(steps, min_size=1, max_size=2), min_size=1, max_size=3), st.floats(0.0, 1.0))
def test_several_curves_meet_the_budget_on_their_common_hull(layers: list[list[list[float]]], fraction: float) -> None:
    """No single change of one layer to a point of its curves saves distortion within the budget that was met."""
    curves = {str(i): [curve(option, cost=60 / len(option)) for option in options] for i, options in enumerate(layers)}
    budget = fraction * 60 * len(layers)
    found = engine.allocate(curves, budget, 0.0)
    kept = sum(float(curves[name][c.curve].kept_cost[c.removed]) for name, c in found.items())
    assert kept <= budget + 1e-6
    largest = max(60 / len(option) for options in layers for option in options)
    assert kept > budget - largest - 1e-6 or any(c.removed == curves[n][c.curve].most_removals for n, c in found.items())


def test_savings_that_a_measured_cost_does_not_show_are_skipped() -> None:
    """The first removals make a layer slower than dense; it stays dense until removing pays, and then jumps there."""
    measured = shaped([10, 12, 11, 9, 6, 5], [0, 1, 2, 3, 4, 5])
    assert allocate({"a": measured}, 10, 0.0) == {"a": 0}
    assert allocate({"a": measured}, 9.5, 0.0) == {"a": 3}
    assert allocate({"a": measured}, 6, 0.0) == {"a": 4}
