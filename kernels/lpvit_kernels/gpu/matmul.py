"""Dense [tokens, features] times a block-sparse matrix: the forward product over block rows, dX over block columns.

Both walk the same values. In the forward product a line is a block row, its blocks [R, C] are read transposed and the product
runs over C; in dX a line is a block column, its blocks are read as they lie and the product runs over R. Below, BLOCK_K is the
side that the product runs over and BLOCK_N the other. One program computes TILE tokens x BLOCK_N features, STEP features of x
at a time:

* STEP <= BLOCK_K: a block takes BLOCK_K / STEP steps.
* STEP > BLOCK_K: STEP / BLOCK_K kept blocks of the line are gathered into one step, so that narrow blocks run at the shape of
  wide ones.

The index of the block needed next is loaded one step ahead and carried: a load of x that had to wait for an index of the same
step would leave the software pipeline fewer buffers in flight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lpvit_kernels.gpu.epilogue import store_result

GROUP = tl.constexpr(8)  # tiles of tokens that share a line's blocks in the L2 cache


@triton.jit(do_not_specialize=["tokens"])
def matmul(
    x,
    values,
    y,
    preactivation,
    bias,
    scale,
    residual,
    ptr,
    across,
    place,
    order,
    tokens,
    features,
    out,
    x_stride,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    RAGGED: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y [tokens, out] = epilogue of x [tokens, features] times the lines of a View.

    x, values    pointers, x with rows `x_stride` elements apart; or (DESCRIPTORS) tensor descriptors of x and of the values as
                 [nnz * R, C], with boxes [TILE, STEP] and [BLOCK_N, STEP] ([STEP, BLOCK_N] if TRANSPOSED)
    ptr, across, place, order    the View
    TRANSPOSED   blocks are [BLOCK_K, BLOCK_N], else [BLOCK_N, BLOCK_K]
    RAGGED       BLOCK_K does not divide `features`
    PRECISION    of float32 products: "tf32" or "ieee"
    """
    tile, line = _assignment(order, tl.cdiv(tokens, TILE), tl.cdiv(out, BLOCK_N))
    start = tl.load(ptr + line)
    end = tl.load(ptr + line + 1)
    row = tl.arange(0, TILE)
    token = (row < tokens - tile * TILE)[:, None]
    acc = tl.zeros((TILE, BLOCK_N), dtype=tl.float32)
    SUB: tl.constexpr = BLOCK_K // STEP  # steps of a block, or
    PER: tl.constexpr = STEP // BLOCK_K  # blocks of a step
    if DESCRIPTORS:
        c, v = _entry(across, place, start, end, TRANSPOSED)
        for s in range(0, (end - start) * SUB):
            inside = (s % SUB) * STEP
            x_tile = x.load([tile * TILE, c * BLOCK_K + inside])
            w = values.load([v * BLOCK_K + inside, 0]) if TRANSPOSED else values.load([v * BLOCK_N, inside]).T
            c, v = _entry(across, place, start + (s + 1) // SUB, end, TRANSPOSED)
            acc = tl.dot(x_tile, w, acc, input_precision=PRECISION)
    elif STEP <= BLOCK_K:
        k = tl.arange(0, STEP)
        x_tiles = x + tile.to(tl.int64) * TILE * x_stride + (row[:, None] * x_stride + k[None, :])
        blocks = values + _inside_block(k, BLOCK_K, BLOCK_N, TRANSPOSED)
        c, v = _entry(across, place, start, end, TRANSPOSED)
        for s in range(0, (end - start) * SUB):
            inside = (s % SUB) * STEP
            at = c * BLOCK_K + inside
            block = blocks + (v * (BLOCK_K * BLOCK_N) + inside * (BLOCK_N if TRANSPOSED else 1))
            if RAGGED:
                feature = at + k < features
                x_tile = tl.load(x_tiles + at, mask=token & feature[None, :], other=0.0)
                w = tl.load(block, mask=feature[:, None], other=0.0)
            else:
                x_tile = tl.load(x_tiles + at, mask=token, other=0.0)
                w = tl.load(block)
            c, v = _entry(across, place, start + (s + 1) // SUB, end, TRANSPOSED)
            acc = tl.dot(x_tile, w, acc, input_precision=PRECISION)
    else:
        lane = tl.arange(0, STEP)
        k = lane % BLOCK_K
        x_rows = x + tile.to(tl.int64) * TILE * x_stride + row[:, None] * x_stride
        blocks = values + _inside_block(k, BLOCK_K, BLOCK_N, TRANSPOSED)
        first = start + lane // BLOCK_K
        c, v = _entry(across, place, first, end, TRANSPOSED)
        for s in range(0, tl.cdiv(end - start, PER)):
            at = c * BLOCK_K + k  # built here: what is carried loses its alignment, and loads fall to single elements
            kept = first + s * PER < end
            if RAGGED:
                kept = kept & (at < features)
            x_tile = tl.load(x_rows + at[None, :], mask=token & kept[None, :], other=0.0)
            w = tl.load(blocks + (v * (BLOCK_K * BLOCK_N))[:, None], mask=kept[:, None], other=0.0)
            c, v = _entry(across, place, first + (s + 1) * PER, end, TRANSPOSED)
            acc = tl.dot(x_tile, w, acc, input_precision=PRECISION)
    store_result(acc, y, preactivation, bias, scale, residual, tile, line, tokens, out, TILE, BLOCK_N, ACTIVATION)


@triton.jit
def _assignment(order, tiles, lines):
    """Which tile of tokens and which line this program computes: GROUP tiles of the heaviest line, then of the next one."""
    program = tl.program_id(0)
    group = program // (GROUP * lines)
    rest = program % (GROUP * lines)
    size = min(tiles - group * GROUP, GROUP)
    return group * GROUP + rest % size, tl.load(order + rest // size)


@triton.jit
def _entry(across, place, i, end, TRANSPOSED: tl.constexpr):
    """Entry i of the View: the block's number along the side the product runs over (past the end 0), its place in `values`."""
    c = tl.load(across + i, mask=i < end, other=0)
    v = i
    if TRANSPOSED:
        v = tl.load(place + i, mask=i < end, other=0)
    return c, v


@triton.jit
def _inside_block(k, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Offsets [k, BLOCK_N] inside a stored block."""
    n = tl.arange(0, BLOCK_N)
    return k[:, None] * BLOCK_N + n[None, :] if TRANSPOSED else k[:, None] + n[None, :] * BLOCK_K
