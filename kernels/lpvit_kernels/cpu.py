"""The CPU backend: one strided matrix product per kept block, accumulated in place.

BLAS reads its slice of x and writes its slice of y where they lie (leading dimensions in and out), so nothing is gathered,
packed or copied. Of the formulations measured (gather + one product per block row, runs of adjacent blocks, transposed
activations, a batched product) it is the fastest from about 60 tokens on; below that, launching a product per block costs
more than it saves (scripts/bench_linear.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpvit_kernels.matrix import BlockSparseMatrix


def linear(x: Tensor, weight: BlockSparseMatrix, bias: Tensor | None) -> Tensor:
    """x [tokens, in] -> [tokens, out]; differentiable in x, the values and the bias, on kept blocks only."""
    y: Tensor = _Linear.apply(x, weight.values, bias, weight)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, bias, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, values)
        ctx.weight = weight
        out = weight.shape[0]
        y = x.new_zeros(len(x), out) if bias is None else bias.repeat(len(x), 1)
        _accumulate(y, x, values, weight, transposed=False)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, values = ctx.saved_tensors
        need_x, need_values, need_bias, _ = ctx.needs_input_grad
        dx = dvalues = None
        if need_x:
            dx = torch.zeros_like(x)
            _accumulate(dx, dy, values, ctx.weight, transposed=True)
        if need_values:
            dvalues = torch.zeros_like(values)
            for (dy_i, x_j), dw in zip(_slices(dy, x, ctx.weight), dvalues.unbind(), strict=True):
                rows, columns = dy_i.shape[1], x_j.shape[1]
                torch.mm(dy_i.T, x_j, out=dw) if dw.shape == (rows, columns) else dw[:rows, :columns].copy_(dy_i.T @ x_j)
        return dx, dvalues, dy.sum(dim=0) if need_bias else None, None


def _accumulate(target: Tensor, source: Tensor, values: Tensor, weight: BlockSparseMatrix, transposed: bool) -> None:
    """target += source W^T, or target += source W when `transposed` (the backward)."""
    pairs = _slices(source, target, weight) if transposed else _slices(target, source, weight)
    for (out_side, in_side), w in zip(pairs, values.unbind(), strict=True):
        w = w[: out_side.shape[1], : in_side.shape[1]]
        if transposed:
            in_side.addmm_(out_side, w)
        else:
            out_side.addmm_(in_side, w.T)


def _slices(out_side: Tensor, in_side: Tensor, weight: BlockSparseMatrix) -> list[tuple[Tensor, Tensor]]:
    """For each kept block, its columns of a [tokens, out] and of a [tokens, in] tensor, as views."""
    rows, columns = out_side.split(weight.block[0], dim=1), in_side.split(weight.block[1], dim=1)
    return [(rows[i], columns[j]) for i, j in weight.places]
