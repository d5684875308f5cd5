"""The gradient of the kept blocks, dvalues[i] = dy[:, block row of i]^T x[:, block column of i]: no dense dW anywhere.

One program takes PER neighbouring blocks of one block row, so that they share dy and fill a tile, and one of `splits` parts of
the tokens, which keeps the GPU busy where blocks are few. Parts are summed afterwards, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "nnz", "steps"])
def weight_gradient(
    dy,
    x,
    dvalues,
    row_ptr,
    cols,
    tokens,
    out,
    features,
    nnz,
    dy_stride,
    x_stride,
    steps,
    R: tl.constexpr,
    C: tl.constexpr,
    PER: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dvalues [splits, nnz, R, C]; dy [tokens, out] and x [tokens, features] with rows `dy_stride`, `x_stride` elements apart.

    Program (chunk, row, split) computes blocks chunk * PER ... of the block row, over `steps` steps of STEP tokens.
    """
    row = tl.program_id(1)
    split = tl.program_id(2)
    start = tl.load(row_ptr + row) + tl.program_id(0) * PER
    end = tl.load(row_ptr + row + 1)
    if start >= end:  # the row has fewer blocks than the grid provides for
        return
    lane = tl.arange(0, PER * C)
    block = start + lane // C
    column = tl.load(cols + block, mask=block < end, other=0) * C + lane % C
    r = tl.arange(0, R)
    n = row * R + r
    rows = (n < out)[:, None]
    columns = ((block < end) & (column < features))[None, :]
    acc = tl.zeros((R, PER * C), dtype=tl.float32)
    for step in range(steps):
        m = (split * steps + step) * STEP + tl.arange(0, STEP)
        m64 = m.to(tl.int64)  # tokens x features may exceed 2^31
        # Read transposed, not transposed after reading: on sm_80 only the former is an asynchronous copy.
        dy_tile = tl.load(dy + m64[None, :] * dy_stride + n[:, None], mask=(m < tokens)[None, :] & rows, other=0.0)
        x_tile = tl.load(x + m64[:, None] * x_stride + column[None, :], mask=(m < tokens)[:, None] & columns, other=0.0)
        acc = tl.dot(dy_tile, x_tile, acc, input_precision=PRECISION)
    at = (split.to(tl.int64) * nnz + block)[None, :] * (R * C) + r[:, None] * C + (lane % C)[None, :]
    tl.store(dvalues + at, acc.to(dvalues.dtype.element_ty), mask=(block < end)[None, :])
