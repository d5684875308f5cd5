"""What the GPU kernels must compute, and the cases they are tried on: by the interpreter on the CPU, and by a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from helpers import relative
from lpvit_kernels import BlockSparseMatrix, kept_product, random_block_sparse
from lpvit_kernels.gpu import Config, epilogue_gradient, forward, input_gradient, weight_gradient
from torch import Tensor
from torch.nn import functional as F

# float32 sums of some hundred float32 products; float16 results round at 3e-4; tf32 inputs do too; bfloat16 results at 2e-3.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
BLOCKS = list(product((16, 32, 64, 128), repeat=2))


@dataclass(frozen=True)
class Case:
    """One weight and number of tokens. The configurations are those of each product; None: the default."""

    shape: tuple[int, int]
    block: tuple[int, int]
    tokens: int
    density: float = 0.5
    imbalance: float = 1.0
    empty: int = 0  # block rows and block columns
    forward: Config | None = None
    input_gradient: Config | None = None
    weight_gradient: Config | None = None


def matrix(case: Case, dtype: torch.dtype, device: str) -> BlockSparseMatrix:
    return random_block_sparse(
        case.shape, case.block, case.density, case.imbalance, case.empty, case.empty, dtype=dtype, device=device
    )


def check_products(case: Case, dtype: torch.dtype, device: str, tolerance: float) -> None:
    """The forward product without an epilogue and both its gradients, against float64."""
    weight = matrix(case, dtype, device)
    x = torch.randn(case.tokens, case.shape[1]).to(device, dtype)
    dy = torch.randn(case.tokens, case.shape[0]).to(device, dtype)
    dense = weight.to_dense().double()
    y, preactivation = forward(x, weight, config=case.forward)
    assert preactivation is None
    close(y, x.double() @ dense.T, tolerance)
    close(input_gradient(dy, weight, case.input_gradient), dy.double() @ dense, tolerance)
    dw = BlockSparseMatrix.from_dense(dy.double().T @ x.double(), case.block, weight.block_mask).values
    # Rounding errors of float32 sums grow like the square root of their length. The padding of ragged blocks must be zero.
    close(weight_gradient(dy, x, weight, case.weight_gradient), dw, tolerance * max(1, case.tokens / 1000) ** 0.5)


def check_kept_product(case: Case, rank: int, dtype: torch.dtype, device: str, tolerance: float) -> None:
    """The product of two factors on kept blocks and its gradients, against the dense one in float64."""
    pattern = matrix(case, dtype, device)
    left = torch.randn(case.shape[0], rank).to(device, dtype).requires_grad_()
    right = torch.randn(rank, case.shape[1]).to(device, dtype).requires_grad_()
    values = kept_product(left, right, pattern, "triton")
    upstream = torch.randn(values.shape).to(device, dtype)
    exact = [t.detach().double().requires_grad_() for t in (left, right)]
    expected = BlockSparseMatrix.from_dense(exact[0] @ exact[1], case.block, pattern.block_mask).values
    close(values, expected, tolerance)
    inside = BlockSparseMatrix.from_dense(torch.ones(case.shape, device=device), case.block, pattern.block_mask).values
    found = torch.autograd.grad((values * inside * upstream).sum(), (left, right))
    for gradient, true in zip(found, torch.autograd.grad((expected * inside * upstream).sum(), exact), strict=True):
        close(gradient, true, tolerance)


def check_epilogue(
    activation: str | None, parts: tuple[str, ...], case: Case, dtype: torch.dtype, device: str, tolerance: float
) -> None:
    """The forward product with a bias, a scale or a residual, and the gradients of all of them, against float64 autograd."""
    weight = matrix(case, dtype, device)
    out = case.shape[0]
    x = torch.randn(case.tokens, case.shape[1]).to(device, dtype)
    dy = torch.randn(case.tokens, out).to(device, dtype)
    given = {name: torch.randn(*((case.tokens,) if name == "residual" else ()), out).to(device, dtype) for name in parts}
    exact = {name: t.double().requires_grad_() for name, t in given.items()}
    z = x.double() @ weight.to_dense().double().T + exact.get("bias", 0)
    z.retain_grad() if z.requires_grad else z.requires_grad_()
    activated = F.gelu(z) if activation else z
    expected = activated * exact.get("scale", 1) + exact.get("residual", 0)
    expected.backward(dy.double())

    save = activation is not None or "scale" in parts
    y, preactivation = forward(x, weight, activation=activation, save_preactivation=save, config=case.forward, **given)
    close(y, expected, tolerance)
    assert (preactivation is not None) == save
    if preactivation is not None:
        close(preactivation, z, tolerance)
    dz, dbias, dscale = epilogue_gradient(dy, preactivation, activation, given.get("scale"), "bias" in parts, "scale" in parts)
    close(dz, z.grad, tolerance)
    for gradient, name in ((dbias, "bias"), (dscale, "scale")):
        assert (gradient is not None) == (name in parts)
        if gradient is not None:
            close(gradient, exact[name].grad, tolerance)


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    if b.abs().sum() == 0:
        assert a.abs().sum() == 0
    else:
        assert relative(a, b) < tolerance  # also fails on NaN
