"""The reference backend: densify, then multiply. Any device and dtype; autograd does the rest."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lpvit_kernels.matrix import BlockSparseMatrix


def linear(x: Tensor, weight: BlockSparseMatrix, bias: Tensor | None) -> Tensor:
    """x [tokens, in] -> [tokens, out]."""
    return F.linear(x, weight.to_dense(), bias)
