"""The reference backend: densify, then multiply. Any device and dtype; autograd does the rest."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lpvit_kernels.matrix import BlockSparseMatrix


def linear(
    x: Tensor,
    weight: BlockSparseMatrix,
    bias: Tensor | None,
    activation: str | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """x [..., in] -> [..., out], as `lpvit_kernels.linear`."""
    y = F.linear(x, weight.to_dense(), bias)
    if activation:
        y = F.gelu(y)
    if scale is not None:
        y = y * scale
    return y if residual is None else y + residual
