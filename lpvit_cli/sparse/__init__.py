"""Block-sparse layers in a timm model."""

from lpvit_cli.sparse.layers import BlockSparseLinear, densify, sparse_layers, sparsify

__all__ = ["BlockSparseLinear", "densify", "sparse_layers", "sparsify"]
