"""The CPU backend: matrix products of kept blocks only, forward and backward.

Many tokens: one strided product per block, accumulated in place. BLAS reads its slice of x and writes its slice of y where
they lie (leading dimensions in and out), so nothing is gathered, packed or copied. Few tokens, where launching a product per
block would cost more than it saves: all blocks in one batched product. scripts/bench_linear.py measures both against dense;
gathering whole block rows, runs of adjacent blocks and transposed activations were slower than these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lpvit_kernels.matrix import BlockSparseMatrix

FEW_TOKENS = 48


def linear(x: Tensor, weight: BlockSparseMatrix, bias: Tensor | None) -> Tensor:
    """x [tokens, in] -> [tokens, out]; differentiable in x, the values and the bias."""
    tensors = (x, weight.values, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y: Tensor = _Linear.apply(*tensors, weight)
        return y
    return _forward(*tensors, weight)  # an autograd function costs as much as a small product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, bias, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, values)
        ctx.weight = weight
        return _forward(x, values, bias, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, values = ctx.saved_tensors
        weight = ctx.weight
        need_x, need_values, need_bias, _ = ctx.needs_input_grad
        dx = torch.zeros_like(x) if need_x else None
        dvalues = torch.zeros_like(values) if need_values else None
        dy_rows, x_columns = _slices(dy, x, weight)
        if dx is not None:
            _, dx_columns = _slices(dy, dx, weight)
            for (i, j), w in zip(weight.places, _trimmed(values, weight), strict=True):
                dx_columns[j].addmm_(dy_rows[i], w)
        if dvalues is not None:
            for (i, j), dw in zip(weight.places, _trimmed(dvalues, weight), strict=True):
                dw.addmm_(dy_rows[i].T, x_columns[j])
        return dx, dvalues, dy.sum(dim=0) if need_bias else None, None


def _forward(x: Tensor, values: Tensor, bias: Tensor | None, weight: BlockSparseMatrix) -> Tensor:
    return (_batched if len(x) < FEW_TOKENS else _strided)(x, values, bias, weight)


def _strided(x: Tensor, values: Tensor, bias: Tensor | None, weight: BlockSparseMatrix) -> Tensor:
    y = x.new_empty(len(x), weight.shape[0])
    rows, columns = _slices(y, x, weight)
    written = [False] * len(rows)
    for (i, j), w in zip(weight.places, _trimmed(values, weight), strict=True):
        if written[i]:
            rows[i].addmm_(columns[j], w.T)
        else:
            torch.mm(columns[j], w.T, out=rows[i])
            written[i] = True
    for row, done in zip(rows, written, strict=True):
        if not done:
            row.zero_()
    return y if bias is None else y.add_(bias)


def _batched(x: Tensor, values: Tensor, bias: Tensor | None, weight: BlockSparseMatrix) -> Tensor:
    out, features = weight.shape
    rows, columns = weight.grid
    x = F.pad(x, (0, columns * weight.block[1] - features)).unflatten(1, (columns, -1)).transpose(0, 1)  # [in/C, tokens, C]
    products = torch.bmm(x[weight.cols.long()], values.transpose(1, 2))  # [nnz, tokens, R]
    y = x.new_zeros(rows, x.shape[1], weight.block[0]).index_add_(0, weight.block_rows, products)
    y = y.transpose(0, 1).flatten(1)[:, :out]
    return y.contiguous() if bias is None else y + bias


def _slices(out_side: Tensor, in_side: Tensor, weight: BlockSparseMatrix) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Views of a [tokens, out] tensor by block row and of a [tokens, in] tensor by block column."""
    return out_side.split(weight.block[0], dim=1), in_side.split(weight.block[1], dim=1)


def _trimmed(values: Tensor, weight: BlockSparseMatrix) -> tuple[Tensor, ...] | list[Tensor]:
    """Views of the blocks [R, C], ragged ones without their padding."""
    (out, features), (height, width) = weight.shape, weight.block
    blocks = values.unbind()
    if out % height == 0 and features % width == 0:
        return blocks
    return [w[: out - i * height, : features - j * width] for (i, j), w in zip(weight.places, blocks, strict=True)]
