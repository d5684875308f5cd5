"""Block-sparse layers in a model."""

from lpvit_cli.sparse.frozen import freeze
from lpvit_cli.sparse.fused import fuse
from lpvit_cli.sparse.layers import BlockSparseLinear, densify, layer_tokens, sparse_layers, sparsify

__all__ = ["BlockSparseLinear", "densify", "freeze", "fuse", "layer_tokens", "sparse_layers", "sparsify"]
