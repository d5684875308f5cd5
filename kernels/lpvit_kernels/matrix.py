"""A weight matrix that stores its non-zero blocks only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from lpvit_kernels.memo import Made, drop, memo

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class View:
    """The kept blocks line by line; a line is a block row (`by_row`) or a block column (`by_column`). All int32.

    ptr     [lines + 1]: line i holds entries ptr[i] to ptr[i + 1]
    across  [nnz]: an entry's block column (by_row) or block row (by_column), ascending within a line
    place   [nnz]: an entry's position in `values`
    order   [lines]: lines by descending number of entries, so that a GPU starts with the heaviest
    """

    ptr: Tensor
    across: Tensor
    place: Tensor
    order: Tensor


@dataclass(frozen=True, eq=False)
class BlockSparseMatrix:
    """A weight [out, in] (PyTorch layout) made of kept blocks of R output features x C input features.

    values   [nnz, R, C] float: the kept blocks, block row by block row; zero outside [out, in] at ragged edges
    row_ptr  [ceil(out / R) + 1] int32: block row i holds values[row_ptr[i]:row_ptr[i + 1]]
    cols     [nnz] int32: block column of each value, ascending within a block row
    shape    (out, in); R and C need not divide it

    Every other index (`by_row`, and the transposed `by_column` with `col_ptr`, `rows`, `perm`) is derived from these on first
    use, once for all matrices that share `row_ptr` and `cols`; the transposed ones point into the same values.

    Construction checks shapes, types, devices and indices, and raises ValueError; `check=False` is for parts that were checked
    before. Padding of ragged edges is not read.
    """

    values: Tensor
    row_ptr: Tensor
    cols: Tensor
    shape: tuple[int, int]
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        if check:
            _check(self.values, self.row_ptr, self.cols, self.shape)

    @classmethod
    def from_dense(cls, weight: Tensor, block: tuple[int, int], mask: Tensor | None = None) -> BlockSparseMatrix:
        """Keep the blocks of `weight` [out, in] where `mask` [ceil(out/R), ceil(in/C)] is True; None: those not all zero."""
        if weight.ndim != 2:
            raise ValueError(f"weight must be [out, in], got {list(weight.shape)}")
        if not isinstance(block, tuple | list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
            raise ValueError(f"block must be two positive whole numbers (out, in), got {block}")
        out, features = weight.shape
        rows, columns = -(-out // block[0]), -(-features // block[1])
        padded = F.pad(weight, (0, columns * block[1] - features, 0, rows * block[0] - out))
        blocks = padded.reshape(rows, block[0], columns, block[1]).transpose(1, 2)  # [rows, columns, R, C]
        if mask is None:
            mask = (blocks != 0).flatten(2).any(dim=2)
        if mask.dtype != torch.bool or mask.shape != (rows, columns):
            raise ValueError(f"mask must be bool {[rows, columns]}, got {mask.dtype} {list(mask.shape)}")
        mask = mask.to(weight.device)
        row_ptr = F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)).int()
        return cls(blocks[mask].contiguous(), row_ptr, mask.nonzero()[:, 1].int(), (out, features))

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def block(self) -> tuple[int, int]:
        return self.values.shape[1], self.values.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along out and in."""
        return -(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1])

    def derived(self, name: str, make: Callable[[], Made]) -> Made:
        """What `make()` gives, made once for all matrices of this pattern. It must not hold `row_ptr` and `cols`.

        It lives and changes with both: it is kept with `cols`, in what is kept with `row_ptr`.
        """
        of_rows = memo(self.row_ptr, "by columns", WeakTensorKeyDictionary)
        return memo(self.cols, f"{name} {self.shape} {self.block}", make, of_rows)

    @property
    def block_rows(self) -> Tensor:
        """[nnz] int64: block row of each value."""
        return self.derived("block_rows", lambda: _block_rows(self.row_ptr))

    @property
    def by_row(self) -> View:
        """The kept blocks by block row, as `values` holds them."""
        return self.derived("by_row", lambda: _by_row(self.row_ptr, self.cols))

    @property
    def by_column(self) -> View:
        """The kept blocks by block column: what the product with the transposed weight walks."""
        return self.derived("by_column", lambda: _by_column(self.block_rows, self.cols, self.grid[1]))

    @property
    def col_ptr(self) -> Tensor:
        """[ceil(in / C) + 1] int32: block column j holds values[perm[col_ptr[j]:col_ptr[j + 1]]]."""
        return self.by_column.ptr

    @property
    def rows(self) -> Tensor:
        """[nnz] int32: block row of each value in the order of `perm`."""
        return self.by_column.across

    @property
    def perm(self) -> Tensor:
        """[nnz] int32: positions in `values`, block column by block column."""
        return self.by_column.place

    @property
    def block_mask(self) -> Tensor:
        """[ceil(out/R), ceil(in/C)] bool: which blocks are kept."""
        mask = torch.zeros(self.grid, dtype=torch.bool, device=self.cols.device)
        mask[self.block_rows, self.cols.long()] = True
        return mask

    @property
    def rows_agree(self) -> bool:
        """Whether all block rows that keep any block keep the same columns."""
        return self.derived("rows_agree", lambda: len(self.block_mask[self.block_mask.any(dim=1)].unique(dim=0)) <= 1)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Block row and column of each value, as Python numbers."""
        return self.derived("places", lambda: list(zip(self.block_rows.tolist(), self.cols.tolist(), strict=True)))

    @property
    def density(self) -> float:
        """Kept blocks over all blocks."""
        rows, columns = self.grid
        return len(self.cols) / (rows * columns)

    def to_dense(self) -> Tensor:
        """The weight [out, in]; differentiable in `values`."""
        rows, columns = self.grid
        blocks = self.values.new_zeros(rows * columns, *self.block)
        blocks = blocks.index_copy(0, self.block_rows * columns + self.cols, self.values)
        dense = blocks.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2).flatten(0, 1)
        return dense[: self.shape[0], : self.shape[1]]

    def with_values(self, values: Tensor) -> BlockSparseMatrix:
        """The same pattern with other values of the same shape; differentiable, and checked for shape only."""
        if values.shape != self.values.shape:
            raise ValueError(f"values must be {list(self.values.shape)}, got {list(values.shape)}")
        return BlockSparseMatrix(values, self.row_ptr, self.cols, self.shape, check=False)

    def to(self, *args: object, **kwargs: object) -> BlockSparseMatrix:
        """As torch.Tensor.to, for a device, a floating type, or both; indices stay int32."""
        values = self.values.to(*args, **kwargs)  # type: ignore[call-overload]
        row_ptr, cols = self.row_ptr.to(values.device), self.cols.to(values.device)
        return BlockSparseMatrix(values, row_ptr, cols, self.shape, check=False)


def forget(weight: BlockSparseMatrix) -> None:
    """Drop the copies and indices kept of this weight, after a change that torch does not count (see kept.py)."""
    drop(weight.values, weight.row_ptr, weight.cols)


def _block_rows(row_ptr: Tensor) -> Tensor:
    counts = row_ptr.diff().long()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def _by_row(row_ptr: Tensor, cols: Tensor) -> View:
    # row_ptr and cols are the keys that the view is kept under: held by it, they would never be let go
    row_ptr, cols = (index.clone(memory_format=torch.contiguous_format) for index in (row_ptr, cols))
    return _view(row_ptr, cols, torch.arange(len(cols), dtype=torch.int32, device=cols.device))


def _by_column(block_rows: Tensor, cols: Tensor, columns: int) -> View:
    perm = cols.argsort(stable=True)  # stable: rows ascend within a column
    counts = torch.bincount(cols, minlength=columns)
    return _view(F.pad(counts.cumsum(dim=0), (1, 0)).int(), block_rows[perm].int(), perm.int())


def _view(ptr: Tensor, across: Tensor, place: Tensor) -> View:
    order = ptr.diff().argsort(descending=True, stable=True).int()
    return View(ptr, across, place, order)


def _check(values: Tensor, row_ptr: Tensor, cols: Tensor, shape: tuple[int, int]) -> None:
    if values.ndim != 3 or 0 in values.shape[1:] or values.dtype not in DTYPES:
        raise ValueError(f"values must be floating [nnz, R, C] with R, C > 0, got {values.dtype} {list(values.shape)}")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape must be (out, in), both positive, got {shape}")
    nnz, block_rows, block_columns = values.shape
    rows, columns = -(-shape[0] // block_rows), -(-shape[1] // block_columns)
    for name, index, length in (("row_ptr", row_ptr, rows + 1), ("cols", cols, nnz)):
        if index.dtype != torch.int32 or index.shape != (length,):
            raise ValueError(f"{name} must be int32 [{length}], got {index.dtype} {list(index.shape)}")
        if index.device != values.device:
            raise ValueError(f"{name} is on {index.device}, values on {values.device}")
    counts = row_ptr.diff()
    if int(row_ptr[0]) != 0 or int(row_ptr[-1]) != nnz or bool((counts < 0).any()):
        raise ValueError(f"row_ptr must ascend from 0 to nnz = {nnz}")
    if nnz and (int(cols.min()) < 0 or int(cols.max()) >= columns):
        raise ValueError(f"cols must be in 0..{columns - 1}, found {int(cols.min())}..{int(cols.max())}")
    key = torch.repeat_interleave(torch.arange(rows, device=cols.device), counts.long()) * columns + cols
    if bool((key.diff() <= 0).any()):
        raise ValueError("cols must ascend without repeats within each block row")
