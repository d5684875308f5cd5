"""Block-sparse layers in a model."""

from lpvit_cli.sparse.fused import fuse
from lpvit_cli.sparse.layers import BlockSparseLinear, densify, sparse_layers, sparsify

__all__ = ["BlockSparseLinear", "densify", "fuse", "sparse_layers", "sparsify"]
