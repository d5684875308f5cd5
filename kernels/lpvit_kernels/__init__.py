"""Block-sparse linear layers for PyTorch."""

from lpvit_kernels.backends import NAMES as BACKENDS
from lpvit_kernels.matrix import BlockSparseMatrix, forget
from lpvit_kernels.ops import kept_product, linear
from lpvit_kernels.random import random_block_sparse
from lpvit_kernels.tuning import tune

__all__ = ["BACKENDS", "BlockSparseMatrix", "forget", "kept_product", "linear", "random_block_sparse", "tune"]
