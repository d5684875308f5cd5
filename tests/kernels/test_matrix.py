"""The block-sparse matrix: round trips, and every rule of its construction."""

from __future__ import annotations

import pytest
import torch
from helpers import expanded, masked
from hypothesis import given, settings
from hypothesis import strategies as st
from lpvit_kernels import BlockSparseMatrix, random_block_sparse
from torch import Tensor


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.integers(0, 99),
)
def test_round_trip(shape: tuple[int, int], block: tuple[int, int], density: float, seed: int) -> None:
    weight, mask = masked(shape, block, density, seed)
    matrix = BlockSparseMatrix.from_dense(weight, block, mask)
    assert torch.equal(matrix.to_dense(), weight * expanded(mask, shape, block))
    assert torch.equal(matrix.block_mask, mask)
    assert matrix.density == pytest.approx(mask.double().mean().item())
    assert matrix.values.is_contiguous()
    again = BlockSparseMatrix.from_dense(matrix.to_dense(), block)
    assert torch.equal(again.to_dense(), matrix.to_dense())
    assert again.density <= matrix.density


def test_without_a_mask_blocks_with_any_non_zero_are_kept() -> None:
    weight = torch.zeros(4, 6)
    weight[3, 0] = 1e-30
    matrix = BlockSparseMatrix.from_dense(weight, (2, 3))
    assert matrix.block_mask.tolist() == [[False, False], [True, False]]


def test_with_values_shares_the_pattern_and_carries_gradients() -> None:
    weight, mask = masked((6, 8), (2, 4), 0.6)
    matrix = BlockSparseMatrix.from_dense(weight, (2, 4), mask)
    values = matrix.values.clone().requires_grad_()
    other = matrix.with_values(values)
    probe = torch.randn(6, 8)
    (other.to_dense() * probe).sum().backward()
    expected = BlockSparseMatrix.from_dense(probe, (2, 4), mask).values
    assert torch.equal(values.grad, expected)
    assert other.cols is matrix.cols
    assert other.places is matrix.places  # made once, not at every step of training
    with pytest.raises(ValueError, match="values must be"):
        matrix.with_values(values[:-1])
    with pytest.raises(ValueError, match="values must be"):
        matrix.with_values(values[:, :1])
    with pytest.raises(AttributeError, match="cannot assign"):
        matrix.cols = other.cols  # type: ignore[misc]


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.integers(0, 99),
)
def test_the_transposed_view_finds_every_block(
    shape: tuple[int, int], block: tuple[int, int], density: float, seed: int
) -> None:
    weight, mask = masked(shape, block, density, seed)
    matrix = BlockSparseMatrix.from_dense(weight, block, mask)
    transposed = BlockSparseMatrix.from_dense(weight.T, block[::-1], mask.T)
    again = matrix.values[matrix.perm.long()].transpose(1, 2)  # the same values in another order: nothing is stored twice
    assert torch.equal(again, transposed.values)
    assert torch.equal(matrix.col_ptr, transposed.row_ptr)
    assert torch.equal(matrix.rows, transposed.cols)
    for view, counts in ((matrix.by_row, mask.sum(dim=1)), (matrix.by_column, mask.sum(dim=0))):
        assert sorted(view.order.tolist()) == list(range(len(counts)))
        assert (counts[view.order.long()].diff() <= 0).all()
        assert {index.dtype for index in (view.ptr, view.across, view.place, view.order)} == {torch.int32}
    assert matrix.with_values(matrix.values).by_column is matrix.by_column


def test_random_matrices_are_what_was_asked_for() -> None:
    even = random_block_sparse((500, 700), (10, 10), 0.4)
    uneven = random_block_sparse((500, 700), (10, 10), 0.4, imbalance=1.0)
    assert even.density == uneven.density == pytest.approx(0.4)
    spread = [matrix.row_ptr.diff().double().std().item() for matrix in (even, uneven)]
    assert spread[0] < 5 < 10 < spread[1]  # binomial: sqrt(70 x 0.4 x 0.6) = 4.1
    empty = random_block_sparse((50, 70), (16, 16), 0.5, empty_rows=2, empty_columns=1)
    assert not empty.block_mask[:2].any()
    assert not empty.block_mask[:, :1].any()
    assert empty.density == 8 / 20  # two of four rows and four of five columns hold 8 blocks
    same = random_block_sparse((50, 70), (16, 16), 0.5, dtype=torch.float16, seed=3)
    assert torch.equal(same.values, random_block_sparse((50, 70), (16, 16), 0.5, seed=3).values.half())
    assert not torch.equal(same.values, random_block_sparse((50, 70), (16, 16), 0.5, seed=4).values.half())


def test_to_changes_values_only() -> None:
    weight, mask = masked((6, 8), (2, 4), 0.6)
    matrix = BlockSparseMatrix.from_dense(weight, (2, 4), mask).to(torch.float64)
    assert matrix.values.dtype == torch.float64
    assert matrix.cols.dtype == torch.int32
    assert torch.equal(matrix.to_dense(), (weight * expanded(mask, (6, 8), (2, 4))).double())


GOOD = {
    "values": torch.ones(3, 2, 4),
    "row_ptr": torch.tensor([0, 2, 2, 3], dtype=torch.int32),
    "cols": torch.tensor([0, 1, 1], dtype=torch.int32),
    "shape": (6, 8),
}


def index(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"values": torch.ones(3, 8)}, r"values must be floating \[nnz, R, C\]"),
        ({"values": torch.ones(3, 2, 4, dtype=torch.int32)}, "values must be floating"),
        ({"values": torch.ones(3, 0, 4)}, "R, C > 0"),
        ({"shape": (0, 8)}, "shape must be"),
        ({"shape": (6, 8, 1)}, "shape must be"),
        ({"values": torch.ones(3, 2, 4, device="meta")}, "row_ptr is on cpu, values on meta"),
        ({"row_ptr": torch.tensor([0, 2, 2, 3])}, r"row_ptr must be int32 \[4\], got torch.int64"),
        ({"row_ptr": index(0, 2, 3)}, r"row_ptr must be int32 \[4\]"),
        ({"cols": index(0, 1)}, r"cols must be int32 \[3\]"),
        ({"row_ptr": index(1, 2, 2, 3)}, "row_ptr must ascend from 0 to nnz = 3"),
        ({"row_ptr": index(0, 2, 2, 2)}, "row_ptr must ascend from 0 to nnz = 3"),
        ({"row_ptr": index(0, 3, 2, 3)}, "row_ptr must ascend"),
        ({"cols": index(0, 2, 1)}, r"cols must be in 0..1, found 0..2"),
        ({"cols": index(-1, 1, 1)}, "cols must be in 0..1"),
        ({"cols": index(1, 1, 1)}, "ascend without repeats"),
        ({"cols": index(1, 0, 1)}, "ascend without repeats"),
    ],
)
def test_construction_refuses(change: dict[str, object], rule: str) -> None:
    BlockSparseMatrix(**GOOD)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rule):
        BlockSparseMatrix(**{**GOOD, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", [torch.ones(2, 2, dtype=torch.bool), torch.ones(3, 2), torch.ones(3, 2, dtype=torch.uint8)])
def test_a_wrong_mask_is_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"mask must be bool \[3, 2\]"):
        BlockSparseMatrix.from_dense(torch.ones(6, 8), (2, 4), mask)


@pytest.mark.parametrize("block", [(0, 16), (2,), (2, 4, 1), (2, 4.0), (-2, 4), 4], ids=str)
def test_a_wrong_block_is_refused(block: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="block must be two positive whole numbers"):
        BlockSparseMatrix.from_dense(torch.ones(6, 8), block)


def test_a_weight_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must be \[out, in\], got \[6\]"):
        BlockSparseMatrix.from_dense(torch.ones(6), (2, 4))


def test_patterns_that_share_columns_but_not_rows_are_told_apart() -> None:
    values, cols = torch.ones(2, 2, 2), torch.tensor([0, 1]).int()
    one = BlockSparseMatrix(values, torch.tensor([0, 1, 2]).int(), cols, (4, 4))
    other = BlockSparseMatrix(values, torch.tensor([0, 2, 2]).int(), cols, (4, 4))
    assert one.block_mask.tolist() == [[True, False], [False, True]]
    assert other.block_mask.tolist() == [[True, True], [False, False]]
    assert one.places != other.places
    assert one.to_dense().sum() == other.to_dense().sum() == 8
