"""The product of two dense factors on kept blocks, against the dense product under a mask in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import expanded, masked, relative
from lpvit_kernels import BlockSparseMatrix, kept_product
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

CASES = [((48, 64), (8, 16), 0.4), ((44, 60), (8, 16), 0.6), ((20, 33), (20, 8), 0.5), ((48, 64), (16, 16), 1.0)]
BACKENDS = ["auto", "gathered", "strided", "batched", "dense", "reference"]


def factors(shape: tuple[int, int], k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, generator=generator, dtype=dtype) for size in ((shape[0], k), (k, shape[1])))
    return left.requires_grad_(), right.requires_grad_()


def pattern_of(shape: tuple[int, int], block: tuple[int, int], density: float) -> tuple[BlockSparseMatrix, Tensor]:
    weight, mask = masked(shape, block, density)
    return BlockSparseMatrix.from_dense(weight, block, mask), expanded(mask, shape, block)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "block", "density"), CASES)
def test_it_is_the_dense_product_under_the_mask(
    shape: tuple[int, int], block: tuple[int, int], density: float, backend: str
) -> None:
    pattern, mask = pattern_of(shape, block, density)
    left, right = factors(shape, 5)
    values = kept_product(left, right, pattern, backend)
    made = pattern.with_values(values).to_dense()
    assert relative(made, mask * (left @ right)) < 1e-14
    inside = BlockSparseMatrix.from_dense(made.detach(), block, pattern.block_mask).values
    assert torch.equal(values, inside), "the padding of ragged edges is zero"
    upstream = torch.randn_like(made)
    found = torch.autograd.grad((made * upstream).sum(), (left, right))
    expected = torch.autograd.grad((mask * (left @ right) * upstream).sum(), (left, right))
    for gradient, true in zip(found, expected, strict=True):
        assert relative(gradient, true) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_type_is_accurate_to_its_rounding(dtype: torch.dtype) -> None:
    pattern, mask = pattern_of((48, 64), (8, 16), 0.5)
    left, right = factors((48, 64), 16, dtype)
    made = pattern.with_values(kept_product(left, right, pattern).float()).to_dense()
    bound = 2 * torch.finfo(dtype).eps  # one rounding of the sum, sums themselves in float32
    assert relative(made, mask * (left.double() @ right.double())) < bound


def test_autocast_leaves_it_alone() -> None:
    pattern, mask = pattern_of((48, 64), (8, 16), 0.5)
    left, right = factors((48, 64), 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        values = kept_product(left, right, pattern)
    assert relative(pattern.with_values(values).to_dense(), mask * (left.double() @ right.double())) < 1e-6


def test_no_block_kept_gives_no_values_and_zero_gradients() -> None:
    pattern, _ = pattern_of((48, 64), (8, 16), 0.0)
    left, right = factors((48, 64), 4)
    values = kept_product(left, right, pattern)
    assert values.shape == (0, 8, 16)
    values.sum().backward()
    assert not left.grad.any()
    assert not right.grad.any()


def test_it_keeps_the_promises_of_its_schema_and_counts_kept_blocks_only() -> None:
    pattern, _ = pattern_of((48, 64), (8, 16), 0.5)
    left, right = factors((48, 64), 4)
    arguments = (left.detach().T, right.detach(), pattern.values.double(), pattern.row_ptr, pattern.cols, "gathered")
    torch.library.opcheck(torch.ops.lpvit.block_sparse_kept_product.default, arguments)
    with FlopCounterMode(display=False) as counter:
        kept_product(left, right, pattern)
    assert counter.get_total_flops() == 2 * 4 * pattern.values.numel()


def test_what_does_not_fit_is_refused() -> None:
    pattern, _ = pattern_of((48, 64), (8, 16), 0.5)
    left, right = factors((48, 64), 4)
    for wrong, message in (
        ((left[:, :3], right), "factors must be"),
        ((left[:40], right), r"the product is \[40, 64\], the pattern \[48, 64\]"),
        ((left.float(), right), "of one type"),
        ((left, right, pattern, "fast"), "unknown backend 'fast'"),
    ):
        with pytest.raises(ValueError, match=message):
            kept_product(*wrong, *([pattern] if len(wrong) == 2 else []))  # type: ignore[call-arg]
