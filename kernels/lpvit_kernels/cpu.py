"""The CPU forms of the product: what of a block-sparse layer is given to BLAS, and how.

    strided   one product per block, accumulated in place: BLAS reads its slice of x and writes its slice of y where they lie
    gathered  one product per block row: the slices of x it needs side by side, times its blocks one above the other
    batched   all blocks in one batched product: for so few tokens that launching a product per block would cost more

Which is fastest depends on the block, the tokens and the machine: dispatch.py chooses. Each form also runs over the transposed
weight, for the gradient of the input; the gradient of the values has forms of its own. All take tokens in chunks that stay in
the cache. In 16 bits `strided` rounds after every block: there neither a rule nor tuning chooses it for a product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lpvit_kernels.matrix import BlockSparseMatrix
from lpvit_kernels.memo import memo

CHUNK = 256  # tokens

Form = Callable[[Tensor, BlockSparseMatrix, bool], Tensor]


def strided(x: Tensor, weight: BlockSparseMatrix, transposed: bool) -> Tensor:
    """x [tokens, in] -> x W^T [tokens, out]; `transposed`: [tokens, out] -> x W [tokens, in]."""
    lines, blocks = _lines(weight, transposed), _blocks(weight, transposed)
    y = x.new_empty(len(x), weight.shape[transposed])
    for x_part, y_part in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        x_slices, y_slices = _slices(x_part, weight, not transposed), _slices(y_part, weight, transposed)
        for line, target in zip(lines, y_slices, strict=True):
            if not line:
                target.zero_()
            for place, (source, block) in enumerate(line):
                if place:
                    target.addmm_(x_slices[source], blocks[block])
                else:
                    torch.mm(x_slices[source], blocks[block], out=target)
    return y


def gathered(x: Tensor, weight: BlockSparseMatrix, transposed: bool) -> Tensor:
    """As `strided`."""
    packed = memo(weight.values, f"gathered {transposed}", lambda: _packed(weight, transposed))
    y = x.new_empty(len(x), weight.shape[transposed])
    for x_part, y_part in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        x_slices, y_slices = _slices(x_part, weight, not transposed), _slices(y_part, weight, transposed)
        for (sources, factor), target in zip(packed, y_slices, strict=True):
            if sources:
                torch.mm(torch.cat([x_slices[source] for source in sources], dim=1), factor, out=target)
            else:
                target.zero_()
    return y


def batched(x: Tensor, weight: BlockSparseMatrix, transposed: bool) -> Tensor:
    """As `strided`."""
    here, there = (0, 1) if transposed else (1, 0)
    sources, targets = (weight.block_rows, weight.cols.long()) if transposed else (weight.cols.long(), weight.block_rows)
    slices = F.pad(x, (0, weight.grid[here] * weight.block[here] - weight.shape[here])).unflatten(1, (weight.grid[here], -1))
    products = torch.bmm(slices.transpose(0, 1)[sources], weight.values if transposed else weight.values.mT)  # [nnz, tokens, .]
    y = x.new_zeros(weight.grid[there], len(x), weight.block[there]).index_add_(0, targets, products)
    return y.transpose(0, 1).flatten(1)[:, : weight.shape[there]].contiguous()


def strided_gradient(dy: Tensor, x: Tensor, weight: BlockSparseMatrix) -> Tensor:
    """dy [tokens, out], x [tokens, in] -> gradient of the values [nnz, R, C]."""
    gradient = torch.zeros_like(weight.values, dtype=_sums(x.dtype))
    for dy_part, x_part in zip(dy.split(CHUNK), x.split(CHUNK), strict=True):
        dy_slices, x_slices = _slices(dy_part, weight, False), _slices(x_part, weight, True)
        for (i, j), block in zip(weight.places, _trimmed(gradient, weight), strict=True):
            if gradient.dtype == x.dtype:
                block.addmm_(dy_slices[i].T, x_slices[j])
            else:
                block += dy_slices[i].T @ x_slices[j]
    return gradient.to(x.dtype)


def gathered_gradient(dy: Tensor, x: Tensor, weight: BlockSparseMatrix) -> Tensor:
    """As `strided_gradient`."""
    width = weight.block[1]
    x = F.pad(x, (0, weight.grid[1] * width - weight.shape[1]))
    gradient = torch.zeros_like(weight.values, dtype=_sums(x.dtype))
    for dy_part, x_part in zip(dy.split(CHUNK), x.split(CHUNK), strict=True):
        x_slices, first = x_part.split(width, dim=1), 0
        for line, slice_ in zip(_lines(weight, False), _slices(dy_part, weight, False), strict=True):
            if line:
                product = slice_.T @ torch.cat([x_slices[source] for source, _ in line], dim=1)  # [<= R, k C]
                blocks = gradient[first : first + len(line), : len(product)]
                blocks += product.unflatten(1, (-1, width)).transpose(0, 1)
                first += len(line)
    return gradient.to(x.dtype)


def batched_gradient(dy: Tensor, x: Tensor, weight: BlockSparseMatrix) -> Tensor:
    """As `strided_gradient`."""
    (rows, columns), (height, width) = weight.grid, weight.block
    dy = F.pad(dy, (0, rows * height - weight.shape[0])).unflatten(1, (rows, height)).permute(1, 2, 0)  # [rows, R, tokens]
    x = F.pad(x, (0, columns * width - weight.shape[1])).unflatten(1, (columns, width)).transpose(0, 1)
    return torch.bmm(dy[weight.block_rows], x[weight.cols.long()])


FORMS: dict[str, Form] = {"strided": strided, "gathered": gathered, "batched": batched}
GRADIENTS = {"strided": strided_gradient, "gathered": gathered_gradient, "batched": batched_gradient}


def _sums(dtype: torch.dtype) -> torch.dtype:
    """In which products of this type are added up: what 16 bits round away would add up too."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def _lines(weight: BlockSparseMatrix, transposed: bool) -> list[list[tuple[int, int]]]:
    """For each block row (transposed: block column) the blocks it sums: their slice of the input and their index."""

    def make() -> list[list[tuple[int, int]]]:
        lines: list[list[tuple[int, int]]] = [[] for _ in range(weight.grid[transposed])]
        for block, (i, j) in enumerate(weight.places):
            lines[j if transposed else i].append((i if transposed else j, block))
        return lines

    return weight.derived(f"lines {transposed}", make)


def _packed(weight: BlockSparseMatrix, transposed: bool) -> list[tuple[list[int], Tensor]]:
    """For each block row its slices of the input, and the factor [k C, R] they are multiplied with."""
    blocks = _blocks(weight, transposed)
    return [
        (
            [source for source, _ in line],
            torch.cat([blocks[block] for _, block in line]) if line else weight.values.new_empty(0),
        )
        for line in _lines(weight, transposed)
    ]


def _blocks(weight: BlockSparseMatrix, transposed: bool) -> list[Tensor]:
    """Views of the blocks as right factors: [C, R], or [R, C] of the transposed product."""
    blocks = _trimmed(weight.values, weight)
    return list(blocks) if transposed else [block.T for block in blocks]


def _trimmed(values: Tensor, weight: BlockSparseMatrix) -> tuple[Tensor, ...] | list[Tensor]:
    """Views of the blocks [R, C], ragged ones without their padding."""
    (out, features), (height, width) = weight.shape, weight.block
    blocks = values.unbind()
    if out % height == 0 and features % width == 0:
        return blocks
    return [w[: out - i * height, : features - j * width] for (i, j), w in zip(weight.places, blocks, strict=True)]


def _slices(x: Tensor, weight: BlockSparseMatrix, columns: bool) -> tuple[Tensor, ...]:
    """Views of a [tokens, out] tensor by block row, or of a [tokens, in] tensor by block column."""
    return x.split(weight.block[columns], dim=1)
