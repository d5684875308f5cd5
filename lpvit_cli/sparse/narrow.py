"""Physically smaller modules: an MLP with fewer hidden neurons, an attention with fewer heads. Exact: what goes was unused."""

from __future__ import annotations

from typing import Any

import torch
from lpvit_kernels import BlockSparseMatrix
from timm.layers import Mlp
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from lpvit_cli.sparse.layers import BlockSparseLinear


def width(module: nn.Module) -> int | None:
    """Hidden neurons of an MLP or heads of an attention: what `narrow` makes fewer; None for other modules."""
    if isinstance(module, Mlp):
        neurons = getattr(module.fc1, "out_features", None)  # a convolution has none
        assert neurons is None or isinstance(neurons, int)
        return neurons
    return module.num_heads if isinstance(module, Attention | WindowAttention) else None


def narrow(module: nn.Module, keep: Tensor) -> None:
    """Keep, in place, the hidden neurons (timm's Mlp) or the heads (Attention, WindowAttention) at `keep` (indices) only.

    Inputs and outputs keep their sizes. Exact where the layer that reads the others has zeros for them. Of block-sparse
    layers whole blocks should go: the others stay what they are.
    """
    if isinstance(module, Mlp):
        module.fc1, module.fc2 = _rows(module.fc1, keep), _columns(module.fc2, keep)
        return
    assert isinstance(module, Attention | WindowAttention)
    head = module.proj.in_features // module.num_heads
    features = (keep[:, None] * head + torch.arange(head)).flatten()
    module.qkv = _rows(module.qkv, (features + module.proj.in_features * torch.arange(3)[:, None]).flatten())
    module.proj = _columns(module.proj, features)
    module.num_heads = len(keep)
    if isinstance(module, Attention):
        module.attn_dim = len(features)
    else:
        table = module.relative_position_bias_table
        module.relative_position_bias_table = nn.Parameter(table.detach()[:, keep].clone())


def dense_weight(layer: nn.Module) -> Tensor:
    """[out, in] of a linear layer, block-sparse or not; detached."""
    weight: Any = layer.weight
    dense: Tensor = weight.to_dense() if isinstance(weight, BlockSparseMatrix) else weight
    return dense.detach()


def _rows(layer: Any, keep: Tensor) -> Any:
    return _like(layer, dense_weight(layer)[keep], None if layer.bias is None else layer.bias.detach()[keep])


def _columns(layer: Any, keep: Tensor) -> Any:
    return _like(layer, dense_weight(layer)[:, keep], layer.bias)


def _like(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    if isinstance(layer, BlockSparseLinear):
        return BlockSparseLinear(BlockSparseMatrix.from_dense(weight, layer.weight.block), bias)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.clone())
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
    return made
