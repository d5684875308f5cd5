"""All backends of the CPU against float64 products with the masked dense weight, forward and backward."""

from __future__ import annotations

import pytest
import torch
from helpers import expanded, masked, relative
from lpvit_kernels import BACKENDS, BlockSparseMatrix, cpu, linear
from torch.nn import functional as F

ON_CPU = [backend for backend in BACKENDS if backend != "triton"]

# out x in, block, density: dividing, ragged, ragged on one side only, tall, one block, none kept, all kept
CASES = [
    ((64, 96), (32, 16), 0.5),
    ((50, 70), (16, 32), 0.5),
    ((50, 96), (16, 32), 0.5),
    ((64, 70), (32, 16), 0.5),
    ((96, 40), (48, 8), 0.3),
    ((20, 24), (32, 32), 1.0),
    ((64, 96), (32, 16), 0.0),
    ((64, 96), (32, 16), 1.0),
]
# Products of up to 96 terms: float32 rounds at 6e-8, bfloat16 at 4e-3 a term, errors grow like the square root.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 17, 197])
@pytest.mark.parametrize(("shape", "block", "density"), CASES)
def test_forward_and_backward(
    shape: tuple[int, int], block: tuple[int, int], density: float, tokens: int, dtype: torch.dtype, backend: str
) -> None:
    weight, mask = masked(shape, block, density)
    if density == 0.5:
        mask[0] = False  # an empty block row
        mask[:, 0] = False  # an empty block column
    matrix = BlockSparseMatrix.from_dense(weight.to(dtype), block, mask)
    values = matrix.values.clone().requires_grad_()
    x = torch.randn(tokens, shape[1]).to(dtype).requires_grad_()
    bias = torch.randn(shape[0]).to(dtype).requires_grad_()
    dy = torch.randn(tokens, shape[0]).to(dtype)
    y = linear(x, matrix.with_values(values), bias, backend=backend)
    y.backward(dy)

    w64, x64, dy64 = matrix.to_dense().double(), x.detach().double(), dy.double()
    assert y.dtype == dtype
    assert relative(y, x64 @ w64.T + bias.detach().double()) < TOLERANCE[dtype]
    assert relative(bias.grad, dy64.sum(0)) < TOLERANCE[dtype]
    dw = BlockSparseMatrix.from_dense(dy64.T @ x64, block, mask).values
    if density == 0:
        assert x.grad.abs().sum() == 0
        assert values.grad.shape == (0, *block)
    else:
        assert relative(x.grad, dy64 @ w64) < TOLERANCE[dtype]
        assert relative(values.grad, dw) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradcheck(backend: str) -> None:
    weight, mask = masked((7, 10), (3, 4), 0.6)
    matrix = BlockSparseMatrix.from_dense(weight.double(), (3, 4), mask)
    inputs = [torch.randn(2, 3, 10).double(), matrix.values.clone(), torch.randn(7).double(), torch.randn(2, 3, 7).double()]
    # the padding of ragged blocks is no part of the weight: its gradient must be zero, and it is fixed at zero here
    inside = BlockSparseMatrix.from_dense(torch.ones(7, 10).double(), (3, 4), mask).values

    def function(x: torch.Tensor, v: torch.Tensor, b: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return linear(x, matrix.with_values(v * inside), b, activation="gelu", residual=r, backend=backend)

    assert torch.autograd.gradcheck(function, [i.requires_grad_() for i in inputs])


@pytest.mark.parametrize("backend", ON_CPU)
def test_activation_residual_and_shapes(backend: str) -> None:
    weight, mask = masked((50, 70), (16, 32), 0.5)
    matrix = BlockSparseMatrix.from_dense(weight, (16, 32), mask)
    x = torch.randn(70, 3, 5).permute(2, 1, 0)  # [5, 3, 70], not contiguous
    residual = torch.randn(5, 3, 50)
    dense = weight.double() * expanded(mask, (50, 70), (16, 32))
    with torch.inference_mode():
        y = linear(x, matrix, activation="gelu", residual=residual, backend=backend)
    assert relative(y, F.gelu(x.double() @ dense.T) + residual) < 1e-6
    assert linear(x[:0], matrix, backend=backend).shape == (0, 3, 50)
    assert linear(x, matrix, backend=backend).is_contiguous()


@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast_follows_dense_linear(backend: str) -> None:
    weight, mask = masked((64, 96), (32, 16), 0.5)
    matrix = BlockSparseMatrix.from_dense(weight, (32, 16), mask)
    values = matrix.values.clone().requires_grad_()
    x = torch.randn(10, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, matrix.with_values(values), torch.zeros(64), backend=backend)
        dense = F.linear(x, matrix.to_dense())
    assert y.dtype == dense.dtype == torch.bfloat16
    assert relative(y, dense) < 1e-2
    y.sum().backward()
    assert x.grad.dtype == values.grad.dtype == torch.float32


def test_no_gradient_is_computed_that_nobody_asked_for() -> None:
    weight, mask = masked((64, 96), (32, 16), 0.5)
    matrix = BlockSparseMatrix.from_dense(weight, (32, 16), mask)
    x = torch.randn(10, 96, requires_grad=True)
    linear(x, matrix).sum().backward()
    assert relative(x.grad, matrix.to_dense().double().sum(0).expand(10, 96)) < 1e-6
    assert matrix.values.grad is None


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"x": torch.ones(2, 95)}, "x has 95 features, the weight takes 96"),
        ({"backend": "triton"}, "the triton backend cannot run: it needs a GPU"),
        ({"backend": "fast"}, "unknown backend 'fast': use one of auto, triton, cpu, strided, gathered"),
        ({"activation": "relu"}, "activation must be None or 'gelu'"),
        ({"x": torch.ones(2, 96).double()}, "x is torch.float64, but weight torch.float32: convert to one type"),
        ({"bias": torch.ones(64).double()}, "x is torch.float32, but bias torch.float64"),
        ({"x": torch.ones(2, 96, device="meta")}, "x is on meta, the weight on cpu"),
        ({"x": torch.tensor(1.0)}, r"x must be \[..., in\], got a single number"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], rule: str) -> None:
    weight, mask = masked((64, 96), (32, 16), 0.5)
    matrix = BlockSparseMatrix.from_dense(weight, (32, 16), mask)
    with pytest.raises(ValueError, match=rule):
        linear(**{"x": torch.ones(2, 96), "weight": matrix, **arguments})  # type: ignore[arg-type]


def test_a_dense_weight_is_refused() -> None:
    with pytest.raises(TypeError, match="weight must be a BlockSparseMatrix .*, got Tensor"):
        linear(torch.ones(2, 96), torch.ones(64, 96))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", cpu.GRADIENTS)
def test_gradients_of_many_tokens_in_16_bits_are_added_up_in_float32(form: str, dtype: torch.dtype) -> None:
    """Rounding every chunk's sum would lose 4 % of these 20,000 tokens in bfloat16."""
    matrix = BlockSparseMatrix.from_dense(torch.ones(32, 16, dtype=dtype), (32, 16))
    x, dy = torch.ones(20000, 16, dtype=dtype), torch.ones(20000, 32, dtype=dtype)
    x += torch.rand(20000, 16).to(dtype) / 4
    exact = BlockSparseMatrix.from_dense(dy.double().T @ x.double(), (32, 16)).values
    assert relative(cpu.GRADIENTS[form](dy, x, matrix), exact) < torch.finfo(dtype).eps / 3


def test_autocast_leaves_float64_alone_as_dense_linear_does() -> None:
    weight, mask = masked((64, 96), (32, 16), 0.5)
    matrix = BlockSparseMatrix.from_dense(weight.double(), (32, 16), mask)
    x = torch.randn(3, 96).double()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, matrix)
    assert y.dtype == torch.float64
    assert relative(y, x @ matrix.to_dense().T) < TOLERANCE[torch.float64]


def test_a_cpu_backend_refuses_tensors_of_other_devices() -> None:
    weight, mask = masked((64, 96), (32, 16), 0.5)
    matrix = BlockSparseMatrix.from_dense(weight, (32, 16), mask).to("meta")
    with pytest.raises(ValueError, match="the strided backend needs CPU tensors, x is on meta"):
        linear(torch.ones(2, 96, device="meta"), matrix, backend="strided")


def test_a_named_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask = masked((64, 96), (32, 16), 0.5)
    matrix = BlockSparseMatrix.from_dense(weight, (32, 16), mask)
    monkeypatch.setitem(cpu.FORMS, "strided", lambda x, weight, transposed: torch.full((len(x), 64), 7.0))
    assert linear(torch.ones(2, 96), matrix, backend="strided").tolist() == [[7.0] * 64] * 2
    assert 7.0 not in linear(torch.ones(2, 96), matrix, backend="gathered")


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    weight, mask = masked((64, 96), (32, 16), 0.5)
    matrix = BlockSparseMatrix.from_dense(weight, (32, 16), mask)
    x = torch.randn(3, 96, requires_grad=True)
    values = matrix.values.clone().requires_grad_()
    (dx,) = torch.autograd.grad(linear(x, matrix.with_values(values)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_biases_and_residuals_of_other_shapes_are_refused_and_vectors_are_not() -> None:
    weight, mask = masked((64, 96), (32, 16), 0.5)
    matrix = BlockSparseMatrix.from_dense(weight, (32, 16), mask)
    x = torch.randn(3, 96)
    with pytest.raises(ValueError, match=r"bias must be \[64\], got \[1\]"):
        linear(x, matrix, torch.zeros(1))
    with pytest.raises(ValueError, match=r"residual must be \[3, 64\], got \[2, 3, 64\]"):
        linear(x, matrix, residual=torch.zeros(2, 3, 64))
    assert relative(linear(x[0], matrix), matrix.to_dense() @ x[0]) < 1e-5
