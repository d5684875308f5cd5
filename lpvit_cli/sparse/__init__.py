"""Block-sparse layers in a timm model."""

from lpvit_cli.sparse.fused import fuse
from lpvit_cli.sparse.layers import BlockSparseLinear, densify, sparse_layers, sparsify
from lpvit_cli.sparse.narrow import narrow, width
from lpvit_cli.sparse.trim import order_neurons, trim

__all__ = ["BlockSparseLinear", "densify", "fuse", "narrow", "order_neurons", "sparse_layers", "sparsify", "trim", "width"]
