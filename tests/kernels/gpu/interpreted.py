"""The GPU kernels under Triton's interpreter: their logic, on the CPU. Run by test_gpu_interpreted.py in a process of its own.

It sees neither races nor alignment nor a GPU's limits, and it multiplies bfloat16 wrongly: that is for test_on_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from gpu_cases import BLOCKS, TOLERANCE, Case, check_epilogue, check_kept_product, check_products, close, matrix
from lpvit_kernels import BlockSparseMatrix, linear
from lpvit_kernels.gpu import Config, epilogue_gradient, forward, input_gradient, weight_gradient
from lpvit_kernels.gpu.epilogue import gelu, gelu_gradient
from torch import Tensor
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody has written to is NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_with_the_default_configurations(block: tuple[int, int]) -> None:
    shape = (block[0] * 2 + 9, block[1] * 2 + 7)  # three block rows and columns, the last one ragged
    check_products(Case(shape, block, tokens=17), torch.float32, "cpu", TOLERANCE[torch.float32])


SMALL, MIDDLE, LARGE = Config(16, 32, 4, 2), Config(32, 32, 4, 2), Config(128, 64, 4, 2)
PRODUCTS = {
    "one token": Case((150, 200), (64, 32), 1, forward=SMALL, input_gradient=SMALL),
    "one image": Case((150, 200), (64, 64), 197, forward=Config(64, 64, 4, 2), input_gradient=Config(64, 64, 4, 2)),
    "two images": Case((150, 200), (128, 32), 394, forward=LARGE, input_gradient=LARGE),
    "more than a group of tiles": Case((40, 40), (16, 16), 300, forward=SMALL, input_gradient=SMALL),
    "nothing ragged": Case((128, 96), (64, 32), 40),
    "ragged along out": Case((100, 96), (64, 32), 40),
    "ragged along in": Case((128, 90), (64, 32), 40),
    "a weight smaller than its block": Case((10, 12), (64, 64), 5, 1.0),
    "empty rows and columns": Case((200, 180), (32, 32), 33, 0.4, empty=2),
    "empty rows and columns, gathered": Case((100, 90), (16, 16), 33, 0.4, empty=2),
    "all kept": Case((80, 112), (16, 32), 33, 1.0),
    "none kept": Case((80, 112), (16, 32), 33, 0.0),
    "several steps a block": Case((150, 200), (128, 128), 33, forward=MIDDLE, input_gradient=MIDDLE),
    "eight blocks a step": Case((150, 200), (16, 16), 33, forward=Config(32, 128, 4, 2), input_gradient=Config(32, 128, 4, 2)),
    "descriptors": Case(
        (128, 192), (64, 64), 40, forward=Config(32, 64, 4, 2, True), input_gradient=Config(32, 64, 4, 2, True)
    ),
    "descriptors, several steps a block": Case(
        (128, 256), (64, 128), 40, forward=Config(16, 32, 4, 2, True), input_gradient=Config(16, 32, 4, 2, True)
    ),
    "descriptors that cannot be": Case((100, 90), (64, 64), 40, forward=Config(32, 64, 4, 2, True)),
    "descriptors of nothing": Case((128, 128), (64, 64), 40, 0.0, forward=Config(32, 64, 4, 2, True)),
    "neighbouring blocks": Case((100, 200), (32, 16), 40, weight_gradient=Config(4, 32, 4, 2)),
    "tokens in parts": Case((100, 90), (64, 32), 100, weight_gradient=Config(1, 16, 4, 2, splits=3)),
    "more parts than steps": Case((100, 90), (64, 32), 20, weight_gradient=Config(2, 16, 4, 2, splits=4)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    check_products(PRODUCTS[name], torch.float32, "cpu", TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["empty rows and columns, gathered", "descriptors", "tokens in parts", "ragged along in"])
def test_products_in_half_precision(name: str) -> None:
    check_products(PRODUCTS[name], torch.float16, "cpu", TOLERANCE[torch.float16])


SPARSE = Case((100, 90), (32, 64), 40, 0.4, empty=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("parts", [(), ("bias",), ("bias", "scale", "residual"), ("scale",), ("residual",)])
def test_epilogues(activation: str | None, parts: tuple[str, ...], dtype: torch.dtype) -> None:
    check_epilogue(activation, parts, SPARSE, dtype, "cpu", TOLERANCE[dtype])


def test_epilogue_gradients_of_many_tokens() -> None:
    many = Case((200, 64), (64, 64), 600, 1.0, forward=LARGE)  # three partial sums, two tiles of features
    check_epilogue("gelu", ("bias", "scale"), many, torch.float32, "cpu", TOLERANCE[torch.float32])


def test_rows_that_are_not_contiguous() -> None:
    case = PRODUCTS["ragged along in"]
    weight = matrix(case, torch.float32, "cpu")
    wide = torch.randn(40, 3, 90)
    for x in (wide[:, 1], torch.randn(90, 40).T):
        expected = x.double() @ weight.to_dense().double().T
        assert torch.allclose(forward(x, weight)[0].double(), expected, atol=1e-4)
    dy, residual = torch.randn(128, 40).T, torch.randn(128, 40).T
    y, z = forward(x, weight, residual=residual, save_preactivation=True)
    assert torch.equal(y, z + residual)
    for a, b in zip(epilogue_gradient(dy, z, "gelu", None), epilogue_gradient(dy.contiguous(), z, "gelu", None), strict=True):
        assert a is b is None or torch.equal(a, b)
    assert torch.equal(input_gradient(dy, weight), input_gradient(dy.contiguous(), weight))
    assert torch.equal(weight_gradient(dy, wide[:, 1], weight), weight_gradient(dy, wide[:, 1].contiguous(), weight))


def test_parameters_that_are_not_contiguous() -> None:
    weight = matrix(PRODUCTS["ragged along in"], torch.float32, "cpu")
    wide = torch.randn(128, 2)
    bias, scale = wide[:, 0], wide[:, 1]
    indices = [torch.stack([index, index], dim=1)[:, 0] for index in (weight.row_ptr, weight.cols)]
    strided = BlockSparseMatrix(weight.values.mT.contiguous().mT, *indices, weight.shape)
    x, dy = torch.randn(40, 90), torch.randn(40, 128)

    def everything(weight: BlockSparseMatrix, bias: Tensor, scale: Tensor) -> list[Tensor | None]:
        y, z = forward(x, weight, bias, "gelu", scale, save_preactivation=True)
        assert z is not None
        wide = torch.stack([z, z], dim=2)[..., 0] if scale.stride() != (1,) else z
        gradients = epilogue_gradient(dy, wide, "gelu", scale, True, True)
        return [y, *gradients, input_gradient(dy, weight), weight_gradient(dy, x, weight)]

    found, expected = everything(strided, bias, scale), everything(weight, bias.contiguous(), scale.contiguous())
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_no_tokens() -> None:
    case = PRODUCTS["nothing ragged"]
    weight = matrix(case, torch.float32, "cpu")
    x, dy = torch.ones(0, 96), torch.ones(0, 128)
    assert forward(x, weight)[0].shape == (0, 128)
    assert input_gradient(dy, weight).shape == (0, 96)
    assert weight_gradient(dy, x, weight).abs().sum() == 0


@triton.jit
def _gelu(z, y, gradient, SIZE: tl.constexpr, EXACT: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(z + at)
    tl.store(y + at, gelu(value, EXACT))
    tl.store(gradient + at, gelu_gradient(value, EXACT))


@pytest.mark.parametrize(("exact", "error", "gradient_error"), [(True, 1e-6, 1e-6), (False, 2e-4, 4e-4)])
def test_gelu_and_its_gradient(exact: bool, error: float, gradient_error: float) -> None:
    z = torch.linspace(-12, 12, 4096)
    z[:2], z[-2:] = torch.tensor([-3e4, -1000]), torch.tensor([1000, 3e4])
    y, gradient = torch.empty_like(z), torch.empty_like(z)
    _gelu[(1,)](z, y, gradient, SIZE=4096, EXACT=exact)
    z64: Tensor = z.double().requires_grad_()
    expected = F.gelu(z64)
    expected.sum().backward()
    assert (y - expected).abs().max() < error
    if not exact:
        assert torch.equal(y[z.abs() > 4], z[z.abs() > 4].clamp(min=0))
    assert (gradient - z64.grad).abs().max() < gradient_error


def test_the_public_operation_runs_these_kernels_forward_and_backward() -> None:
    """Through the operator and its autograd, against the reference in float64."""
    weight = matrix(Case((100, 90), (32, 64), 40, 0.4, empty=1), torch.float32, "cpu")
    tensors = [torch.randn(2, 7, 90), weight.values, *torch.randn(2, 100), torch.randn(2, 7, 100)]

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        x, values, bias, scale, residual = inputs = [t.detach().to(dtype).requires_grad_() for t in tensors]
        y = linear(x, weight.with_values(values), bias, "gelu", residual, backend, scale=scale)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    for found, expected in zip(run(torch.float32, "triton"), run(torch.float64, "reference"), strict=True):
        close(found, expected, 4e-6)


@pytest.mark.parametrize("rank", [4, 16, 40])
def test_the_product_of_two_factors_on_kept_blocks(rank: int) -> None:
    for shape in ((96, 128), (100, 90)):
        check_kept_product(Case(shape, (32, 64), 0, 0.5, empty=1), rank, torch.float32, "cpu", 4e-6)
