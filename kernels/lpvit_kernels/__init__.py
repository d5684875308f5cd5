"""Block-sparse linear layers for PyTorch."""

from lpvit_kernels.matrix import BlockSparseMatrix
from lpvit_kernels.ops import BACKENDS, linear

__all__ = ["BACKENDS", "BlockSparseMatrix", "linear"]
