"""The CPU forms of the product: what of a block-sparse layer is given to BLAS, and how.

    strided   one product per block, accumulated in place: BLAS reads its slice of x and writes its slice of y where they lie
    gathered  one product per block row: the slices of x it needs side by side, times its blocks one above the other
    batched   all block rows (or blocks, where rows are uneven) in one batched product: for so few tokens, or so many threads,
              that launching a product for each would cost more

Which is fastest depends on the block, the tokens and the machine: dispatch.py chooses. Each form also runs over the transposed
weight, for the gradient of the input; the gradient of the values has forms of its own. All take tokens in chunks that stay in
the cache. In 16 bits `strided` rounds after every block: there neither a rule nor tuning chooses it for a product.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_kernels.matrix import BlockSparseMatrix
from lpvit_kernels.memo import memo

CHUNK = 256  # tokens
EVEN = 1.25  # how much larger lines may become that are filled up to the longest

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
    return memo(weight.values, f"gathered {transposed}", lambda: Gathered(weight, transposed)).forward(x)


def batched(x: Tensor, weight: BlockSparseMatrix, transposed: bool) -> Tensor:
    """As `strided`."""
    return memo(weight.values, f"batched {transposed}", lambda: Batched(weight, transposed)).forward(x)


class Gathered(nn.Module):
    """The gathered product with one weight, which it holds packed: `sources` and `factor` [k C, R] of each line in turn.

    Lines side by side that read the same slices of x are one line.
    """

    def __init__(self, weight: BlockSparseMatrix, transposed: bool = False):
        super().__init__()
        view, values = (weight.by_column if transposed else weight.by_row), _without_padding(weight)
        self.grid, self.width = weight.grid[not transposed], weight.block[not transposed]
        self.ragged = self.grid * self.width - weight.shape[not transposed]
        ends, places, across = view.ptr.tolist(), view.place.long().split(1), view.across.tolist()
        lines = [(across[begin:end], places[begin:end]) for begin, end in pairwise(ends)]
        self.out, self.widths = weight.shape[transposed], list[int]()
        left = self.out
        for number, (sources, group) in enumerate(groupby(lines, key=lambda line: line[0])):
            factors = [_factor(values[torch.cat(line)], transposed) if sources else values.new_empty(0, 0) for _, line in group]
            self.widths.append(min(left, len(factors) * weight.block[transposed]))
            left -= self.widths[-1]
            self.register_buffer(f"sources{number}", view.place.new_tensor(sources, dtype=torch.long))
            self.register_buffer(f"factor{number}", torch.cat(factors, dim=1)[:, : self.widths[-1]].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out], without a bias."""
        y = x.new_empty(x.shape[0], self.out)
        if x.shape[0] <= CHUNK:
            self._fill(x, y)
        else:
            for x_part, y_part in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
                self._fill(x_part, y_part)
        return y

    def _fill(self, x: Tensor, y: Tensor) -> None:
        slices, parts = _by_block(x, self.grid, self.width, self.ragged), iter(self._buffers.values())
        targets = y.split_with_sizes(self.widths, dim=1) if len(self.widths) > 1 else (y,)
        for target, sources, factor in zip(targets, parts, parts, strict=True):
            if factor.numel():  # type: ignore[union-attr]
                torch.mm(slices.index_select(1, sources).flatten(1), factor, out=target)  # type: ignore[arg-type]
            else:
                target.zero_()


class Batched(nn.Module):
    """The batched product with one weight, which it holds packed.

    A product is a whole line where lines keep about as many blocks, shorter ones filled up with zeros; else it is one block.
    """

    sources: Tensor  # [products * depth]
    factors: Tensor  # [products, depth * C, R]
    lines: Tensor | None  # [products]: what each is part of; None: they are the lines

    def __init__(self, weight: BlockSparseMatrix, transposed: bool = False):
        super().__init__()
        view = weight.by_column if transposed else weight.by_row
        self.grid, self.width = weight.grid[not transposed], weight.block[not transposed]
        self.ragged = self.grid * self.width - weight.shape[not transposed]
        self.count, self.out = weight.grid[transposed], weight.shape[transposed]
        blocks = _without_padding(weight)[view.place.long()]
        blocks = blocks if transposed else blocks.mT.contiguous()
        counts = view.ptr.diff().long()
        line = torch.repeat_interleave(torch.arange(self.count, device=counts.device), counts)
        depth = int(counts.max())
        by_line = 0 < self.count * depth <= EVEN * len(blocks)
        if by_line:
            slot = line * depth + torch.arange(len(line), device=line.device) - view.ptr[line]
            factors = blocks.new_zeros(self.count * depth, *blocks.shape[1:]).index_copy_(0, slot, blocks)
            self.register_buffer("sources", slot.new_zeros(len(factors)).index_copy_(0, slot, view.across.long()))
            self.register_buffer("factors", factors.reshape(self.count, -1, blocks.shape[2]))
        else:
            self.register_buffer("sources", view.across.long())
            self.register_buffer("factors", blocks)
        self.register_buffer("lines", None if by_line else line)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out], without a bias."""
        return self._some(x) if x.shape[0] <= CHUNK else torch.cat([self._some(part) for part in x.split(CHUNK)])

    def _some(self, x: Tensor) -> Tensor:
        factors = self.factors
        slices = _by_block(x, self.grid, self.width, self.ragged).index_select(1, self.sources)
        products = torch.bmm(slices.view(x.shape[0], *factors.shape[:2]).transpose(0, 1), factors)  # [products, tokens, R]
        if self.lines is not None:
            products = x.new_zeros(self.count, *products.shape[1:]).index_add_(0, self.lines, products)
        y = products.transpose(0, 1).flatten(1)
        return y if y.shape[1] == self.out else y[:, : self.out].contiguous()


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


def _by_block(x: Tensor, grid: int, width: int, ragged: int) -> Tensor:
    """x [tokens, features] as [tokens, grid, width], padded by what is missing at a ragged edge."""
    return (F.pad(x, (0, ragged)) if ragged else x).view(x.shape[0], grid, width)


def _factor(blocks: Tensor, transposed: bool) -> Tensor:
    """The blocks [k, R, C] of a line one above the other: [k C, R]; transposed: [k R, C]."""
    return (blocks if transposed else blocks.mT).flatten(0, 1)


def _without_padding(weight: BlockSparseMatrix) -> Tensor:
    """The values, with zeros in the padding of ragged edges."""
    (rows, columns), (height, width), (out, features) = weight.grid, weight.block, weight.shape
    values = weight.values.detach()
    if (out, features) != (rows * height, columns * width):
        values = values.clone()
        values[weight.block_rows == rows - 1, out - (rows - 1) * height :] = 0
        values[weight.cols == columns - 1, :, features - (columns - 1) * width :] = 0
    return values


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
