"""The dense backend: the weight filled with zeros, for layers and machines where nothing sparse is faster.

Block rows and columns that keep nothing are left out first. Where all block rows keep the same columns, what remains is full:
a smaller dense product, and the fastest there is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lpvit_kernels.matrix import BlockSparseMatrix
from lpvit_kernels.memo import memo


def product(x: Tensor, weight: BlockSparseMatrix, transposed: bool, bias: Tensor | None) -> Tensor:
    """x [tokens, in], bias [out] -> x W^T + b [tokens, out]; `transposed`: [tokens, out], bias [in] -> x W + b [tokens, in]."""
    dense, rows, columns = memo(weight.values, "dense", lambda: _shrunk(weight))
    sources, targets = (rows, columns) if transposed else (columns, rows)
    x = x if sources is None else x[:, sources]
    if targets is None:
        return F.linear(x, dense.T if transposed else dense, bias)
    y = F.linear(x, dense.T if transposed else dense)
    whole = y.new_zeros(len(y), weight.shape[transposed]).index_copy_(1, targets, y)
    return whole if bias is None else whole.add_(bias)


def _shrunk(weight: BlockSparseMatrix) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The dense weight without empty rows and columns, and which those are (None: none is empty)."""
    with torch.no_grad():
        dense = weight.to_dense()
        found: list[Tensor | None] = []
        for dim, size in enumerate(weight.block):
            used = weight.block_mask.any(dim=1 - dim).repeat_interleave(size)[: weight.shape[dim]]
            found.append(None if used.all() else used.nonzero()[:, 0])
            if not used.all():
                dense = dense.index_select(dim, used.nonzero()[:, 0])
        return dense.contiguous(), found[0], found[1]
