"""Block OBS against least squares solved from scratch in float64 for every candidate."""

from __future__ import annotations

import pytest
import torch
from helpers import expanded, masked, relative
from torch import Tensor

from lpvit_cli.pruning import block_obs as surgeon
from lpvit_cli.pruning.block_obs import compensated, damped, merged, removal_order
from lpvit_cli.pruning.blocks import grid
from lpvit_cli.pruning.surgeon import prune_layer

Shape = tuple[int, int]
# dividing, wide, one block a row, ragged rows and columns, single weights
CASES = [((8, 12), (4, 3)), ((8, 12), (2, 6)), ((8, 12), (4, 12)), ((7, 10), (3, 4)), ((6, 5), (1, 1))]


def correlated(size: int, generator: torch.Generator) -> Tensor:
    """A second moment of fewer samples than features: singular."""
    d = torch.randn(size - 1, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return d.T @ d / size


def problem(shape: Shape, tokens: int = 50, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, the Hessian of correlated inputs, weights of the output features and their products."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape[1], generator=generator) @ torch.randn(shape[1], shape[1], generator=generator)
    return torch.randn(shape, generator=generator), 2 / tokens * x.T @ x, correlated(shape[0], generator)


def best(weight: Tensor, hessian: Tensor, columns: Tensor) -> Tensor:
    """argmin over W' that is zero outside `columns` of tr((W' - W) H (W' - W)^T), by solving the normal equations."""
    h = damped(hessian.double())
    new = torch.zeros_like(weight, dtype=torch.float64)
    if len(columns):
        new[:, columns] = torch.linalg.solve(h[columns[:, None], columns], h[columns] @ weight.double().T).T
    return new


def error(new: Tensor, weight: Tensor, hessian: Tensor, output_weights: Tensor) -> float:
    d = new - weight.double()
    return float((output_weights.double() @ d @ damped(hessian.double()) @ d.T).trace()) / 2


def greedy_by_brute_force(weight: Tensor, hessian: Tensor, width: int, output_weights: Tensor) -> tuple[list[int], list[float]]:
    """One block row: at each step try every removal, solve for all kept weights anew, take the cheapest."""
    features = weight.shape[1]

    def total(blocks: list[int]) -> float:
        columns = [torch.arange(b * width, min(features, (b + 1) * width)) for b in blocks]
        return error(
            best(weight, hessian, torch.cat(columns) if columns else torch.empty(0).long()), weight, hessian, output_weights
        )

    kept, order, errors, before = list(range(-(-features // width))), [], [], 0.0
    while kept:
        costs = {b: total([k for k in kept if k != b]) for b in kept}
        chosen = min(kept, key=costs.__getitem__)
        kept.remove(chosen)
        order.append(chosen)
        errors.append(costs[chosen] - before)
        before = costs[chosen]
    return order, errors


@pytest.mark.parametrize(("shape", "block"), CASES)
def test_order_and_errors_are_those_of_exact_greedy_removal(shape: Shape, block: Shape) -> None:
    weight, hessian, output_weights = problem(shape)
    order, errors = removal_order(weight, hessian, block, output_weights)
    for i in range(grid(shape, block)[0]):
        rows = slice(i * block[0], (i + 1) * block[0])
        expected = greedy_by_brute_force(weight[rows], hessian, block[1], output_weights[rows, rows])
        assert order[i].tolist() == expected[0]
        assert relative(errors[i], torch.tensor(expected[1])) < 1e-4


@pytest.mark.parametrize(("shape", "block"), CASES)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_kept_weights_are_the_least_squares_solution(shape: Shape, block: Shape, density: float) -> None:
    weight, hessian, _ = problem(shape)
    _, mask = masked(shape, block, density)
    new = compensated(weight, hessian, mask, block)
    elements = expanded(mask, shape, block)
    assert not new[~elements].any()
    expected = torch.stack(
        [best(row[None], hessian, kept.nonzero()[:, 0])[0] for row, kept in zip(weight, elements, strict=True)]
    )
    assert float((new - expected).norm()) <= 1e-5 * float(weight.norm())


@pytest.mark.parametrize(("shape", "block"), CASES)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.7, 1.0])
def test_pruning_a_layer_costs_what_was_predicted(shape: Shape, block: Shape, fraction: float) -> None:
    weight, hessian, _ = problem(shape)
    rows, cols = grid(shape, block)
    keep = round(fraction * rows * cols)
    new, mask, errors = prune_layer(weight, hessian, block, keep)
    assert int(mask.sum()) == keep
    assert len(errors) == rows * cols - keep
    assert not new[~expanded(mask, shape, block)].any()
    measured = error(new.double(), weight, hessian, torch.eye(shape[0]))
    assert measured == pytest.approx(float(errors.sum()), rel=1e-4, abs=1e-6)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights of all greedy searches, from an empty memory on."""
    seen: list[Tensor] = []

    def counted(weight: Tensor, hessian: Tensor, block: Shape) -> tuple[Tensor, Tensor]:
        seen.append(weight)
        return removal_order(weight, hessian, block)

    monkeypatch.setattr(surgeon, "removal_order", counted)
    monkeypatch.setattr(surgeon, "_latest", {})
    return seen


def afresh(weight: Tensor, hessian: Tensor, block: Shape, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    surgeon._latest.clear()
    return prune_layer(weight, hessian, block, keep)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_pruned_again_is_not_searched_again(searches: list[Tensor], dtype: torch.dtype) -> None:
    weight, hessian, _ = (x.to(dtype) for x in problem((8, 12)))
    keeps = (6, 0, 3, 16, 6)
    found = [prune_layer(weight, hessian, (2, 3), keep) for keep in keeps]
    assert len(searches) == 1
    for result, keep in zip(found, keeps, strict=True):
        assert same(result, afresh(weight, hessian, (2, 3), keep))
    prune_layer(weight.clone(), hessian.clone(), (2, 3), 5)
    assert len(searches) == 1 + len(keeps), "the numbers count, not the tensors"


@pytest.mark.parametrize("what", ["weight", "hessian", "weight of a parameter", "block", "damping", "storage", "type"])
def test_a_layer_that_changed_is_searched_again(searches: list[Tensor], monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    weight, hessian, _ = problem((8, 12))
    block = (2, 3)
    if what == "weight of a parameter":
        weight = torch.nn.Parameter(weight)
    before = prune_layer(weight, hessian, block, 7)
    if what == "weight":
        weight[5, 7] += 1e-6  # one number, by its last bits
    if what == "weight of a parameter":
        weight.data[0] *= 3  # counts no version
    if what == "hessian":
        hessian.mul_(0.5)
    if what == "block":
        block = (4, 3)
    if what == "damping":
        monkeypatch.setattr(surgeon, "DAMPING", 0.3)
    if what == "storage":
        weight.numpy()[1, 2] = 9  # past torch
    if what == "type":
        weight, hessian = weight.double(), hessian.double()
    found = prune_layer(weight, hessian, block, 7)
    assert len(searches) == 2
    assert not same(found[2:], before[2:])
    assert same(found, afresh(weight, hessian, block, 7))


def test_what_a_caller_does_to_a_result_reaches_no_later_one(searches: list[Tensor]) -> None:
    weight, hessian, _ = problem((8, 12))
    expected = [x.clone() for x in prune_layer(weight, hessian, (2, 3), 4)]
    for result in prune_layer(weight, hessian, (2, 3), 4):
        result.zero_()
    assert same(prune_layer(weight, hessian, (2, 3), 4), tuple(expected))
    assert len(searches) == 1


def test_one_layer_is_remembered(searches: list[Tensor]) -> None:
    first, second = problem((8, 12)), problem((6, 9), seed=1)
    for weight, hessian, _ in (first, second, first):
        prune_layer(weight, hessian, (2, 3), 4)
    assert len(searches) == 3
    assert len(surgeon._latest) == 1


def test_compensation_beats_plain_removal() -> None:
    weight, hessian, _ = problem((16, 24))
    new, mask, _ = prune_layer(weight, hessian, (4, 4), keep=12)
    plain = weight * expanded(mask, (16, 24), (4, 4))
    ones = torch.eye(16)
    assert error(new.double(), weight, hessian, ones) < 0.7 * error(plain.double(), weight, hessian, ones)


def test_merging_follows_the_errors_but_never_overtakes_within_a_block_row() -> None:
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    errors = torch.tensor([[5.0, 1.0, 9.0], [2.0, 6.0, 7.0]], dtype=torch.float64)
    flat, steps = merged(order, errors)
    assert flat.tolist() == [4, 2, 0, 5, 3, 1]  # the 1.0 waits for the 5.0 before it
    assert steps.tolist() == [2, 5, 1, 6, 7, 9]


def test_inputs_that_are_always_zero_go_first_and_cost_nothing() -> None:
    weight, hessian, _ = problem((8, 12))
    hessian[3:6] = hessian[:, 3:6] = 0
    order, errors = removal_order(weight, hessian, (4, 3))
    assert order[:, 0].tolist() == [1, 1]
    assert bool((errors[:, 0] < 0.05 * errors[:, 1]).all())


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_hessian_of_low_rank_is_damped(rank: int) -> None:
    """Fewer tokens than inputs, down to none at all."""
    weight, _, _ = problem((8, 12))
    x = torch.randn(rank, 12, generator=torch.Generator().manual_seed(4))
    new, mask, errors = prune_layer(weight, x.T @ x, (4, 3), keep=4)
    assert new.isfinite().all()
    assert errors.isfinite().all()
    assert int(mask.sum()) == 4


def test_a_group_of_block_rows_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, output_weights = problem((16, 24))
    together = removal_order(weight, hessian, (2, 4), output_weights)
    monkeypatch.setattr(surgeon, "GROUP_BYTES", 3 * 24 * 24 * 4)
    apart = removal_order(weight, hessian, (2, 4), output_weights)
    assert torch.equal(together[0], apart[0])
    assert relative(apart[1], together[1]) < 1e-5


@pytest.mark.parametrize("damping", [1e-4, 1e-2])
def test_badly_conditioned_inputs_do_not_disturb_the_order(monkeypatch: pytest.MonkeyPatch, damping: float) -> None:
    """Inputs whose sizes span three powers of ten: H has a condition of 1e6 and more."""
    monkeypatch.setattr(surgeon, "DAMPING", damping)
    weight, hessian, output_weights = problem((8, 12))
    scale = torch.logspace(-1.5, 1.5, 12)
    hessian = scale[:, None] * hessian * scale
    order, errors = removal_order(weight, hessian, (8, 3), output_weights)
    expected = greedy_by_brute_force(weight, hessian, 3, output_weights)
    assert order[0].tolist() == expected[0]
    assert relative(errors[0], torch.tensor(expected[1])) < 1e-3


@pytest.mark.parametrize("massive", [1, 3])
def test_massive_inputs_do_not_hide_the_others(massive: int) -> None:
    """Some inputs 1e4 times as large as the rest, under weights that are as much smaller: the same layer, so pruned as well.
    The error is that of the outputs, in float64."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 96, generator=generator).double() @ torch.randn(96, 96, generator=generator).double()
    weight = torch.randn(32, 96, generator=generator).double()
    scale = torch.ones(96).double()
    scale[:massive] = 1e4
    errors = []
    for factor in (torch.ones(96).double(), scale):
        inputs, w = x * factor, weight / factor
        hessian = 2 / len(x) * inputs.T @ inputs
        new, mask, _ = prune_layer(w.float(), hessian.float(), (8, 8), keep=24)
        assert not new[~expanded(mask, (32, 96), (8, 8))].any()
        errors.append(relative(inputs @ new.double().T, inputs @ w.T))
    assert errors[1] < 1.05 * errors[0]


def test_float64_takes_over_where_float32_cannot_factor() -> None:
    """Inputs that are all but copies of one another: M loses its positive diagonal in float32, not in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1, generator=generator) + 1e-4 * torch.randn(400, 64, generator=generator)
    weight, hessian = torch.randn(8, 64, generator=generator), 2 / 400 * x.T @ x
    inverse = surgeon._inverse(surgeon.damped(hessian))
    rounded = inverse + 0.5 * inverse.diagonal().mean() * torch.randn(64, 64, generator=generator)  # not definite any more
    assert surgeon._greedy(weight.reshape(2, 4, 64).clone(), (rounded + rounded.T) / 2, 8)[2], "it says so"
    calls = []
    true = surgeon._greedy

    def fails_in_float32(w: Tensor, inverse: Tensor, width: int) -> tuple[Tensor, Tensor, bool]:
        calls.append(w.dtype)
        order, errors, failed = true(w, inverse, width)
        return order, errors, failed or w.dtype == torch.float32

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surgeon, "_greedy", fails_in_float32)
        order, errors = removal_order(weight, hessian, (4, 8))
    assert calls == [torch.float32, torch.float64]
    expected = removal_order(weight.double(), hessian.double(), (4, 8))
    assert torch.equal(order, expected[0])
    assert torch.allclose(errors, expected[1], rtol=1e-3)
