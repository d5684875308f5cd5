"""What can compute the product, and the one place where a backend is called."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_kernels import cpu, dense, dispatch
from lpvit_kernels.matrix import BlockSparseMatrix
from lpvit_kernels.tuned import Choice

NAMES = ("auto", "triton", "cpu", *cpu.FORMS, "dense", "reference")


def refusal(backend: str, device: str) -> str | None:
    """Why this backend cannot run on this type of device; None: it can."""
    if backend in ("cpu", *cpu.FORMS) and device != "cpu":
        return f"the {backend} backend needs CPU tensors, x is on {device}"
    if backend == "triton" and (missing := dispatch.triton_missing(device)):
        return f"the triton backend cannot run: {missing}"
    return None


def forward(
    x: Tensor,
    weight: BlockSparseMatrix,
    bias: Tensor | None,
    activation: Literal["gelu"] | None,
    scale: Tensor | None,
    residual: Tensor | None,
    needs_z: bool,
    backend: str | Choice,
) -> tuple[Tensor, Tensor | None]:
    """y and, if `needs_z`, z = x W^T + b, all [tokens, ...]."""
    choice = dispatch.choose("forward", backend, x, weight)
    if choice.backend == "triton":
        from lpvit_kernels import gpu

        return gpu.forward(x, weight, bias, activation, scale, residual, choice.config, needs_z)
    y = _product(choice.backend, x, weight, transposed=False, bias=bias)
    z = y if needs_z else None
    if activation:
        y = F.gelu(y) if y is z else torch.ops.aten.gelu_(y)
    if scale is not None:
        y = y * scale if y is z else y.mul_(scale)
    if residual is not None:
        y = y + residual if y is z else y.add_(residual)
    return y.clone() if y is z else y, z


def bound(choice: Choice, weight: BlockSparseMatrix) -> nn.Module | None:
    """The product with this weight on the CPU as it was chosen, x [tokens, in] -> x W^T [tokens, out]: a call looks nothing up.

    It holds what it needs of the weight. None: F.linear with `weight.to_dense()`. `strided`, which would call BLAS from Python
    for every block, is bound as `gathered`.
    """
    if choice.backend == "dense":
        mask = weight.block_mask
        used = mask.any(dim=1, keepdim=True) & mask.any(dim=0)
        if used.all():
            return None
        return cpu.Gathered(BlockSparseMatrix.from_dense(weight.to_dense().detach(), weight.block, used))
    return cpu.Batched(weight) if choice.backend == "batched" else cpu.Gathered(weight)


def epilogue_gradient(
    dy: Tensor,
    z: Tensor | None,
    activation: Literal["gelu"] | None,
    scale: Tensor | None,
    need_bias: bool,
    need_scale: bool,
    backend: str | Choice,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of z, the bias and the scale, from that of y = act(z) * scale + residual; dz may be dy itself."""
    if dispatch.runs_triton(backend, dy):
        from lpvit_kernels import gpu

        return gpu.epilogue_gradient(dy, z, activation, scale, need_bias, need_scale)
    dscale = (dy * (F.gelu(z) if activation else z)).sum(dim=0) if need_scale and z is not None else None
    dz = dy if scale is None else dy * scale
    if activation and z is not None:
        dz = torch.ops.aten.gelu_backward(dz, z)
    return dz, dz.sum(dim=0) if need_bias else None, dscale


def input_gradient(dz: Tensor, weight: BlockSparseMatrix, backend: str | Choice) -> Tensor:
    """dz [tokens, out] -> dz W [tokens, in]."""
    choice = dispatch.choose("input_gradient", backend, dz, weight)
    if choice.backend == "triton":
        from lpvit_kernels import gpu

        return gpu.input_gradient(dz, weight, choice.config)
    return _product(choice.backend, dz, weight, transposed=True, bias=None)


def weight_gradient(dz: Tensor, x: Tensor, weight: BlockSparseMatrix, backend: str | Choice) -> Tensor:
    """dz [tokens, out], x [tokens, in] -> the gradient of the kept blocks [nnz, R, C]. There is no dense form of it."""
    choice = dispatch.choose("weight_gradient", backend, dz, weight)
    if choice.backend == "triton":
        from lpvit_kernels import gpu

        return gpu.weight_gradient(dz, x, weight, choice.config)
    return cpu.GRADIENTS[choice.backend](dz, x, weight)


def _product(form: str, x: Tensor, weight: BlockSparseMatrix, transposed: bool, bias: Tensor | None) -> Tensor:
    if form == "dense":
        return dense.product(x, weight, transposed, bias)
    y = cpu.FORMS[form](x, weight, transposed)
    return y if bias is None else y.add_(bias)  # faster than as part of each small product
