"""Block-sparse linear layers for PyTorch."""

from lpvit_kernels.matrix import BlockSparseMatrix
from lpvit_kernels.ops import BACKENDS, linear
from lpvit_kernels.random import random_block_sparse

__all__ = ["BACKENDS", "BlockSparseMatrix", "linear", "random_block_sparse"]
