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


def is_plain(module: nn.Module) -> bool:
    """Whether no norm and no gate takes part between the two layers, whose result or size other features would change."""
    extras = (getattr(module, "norm", None), getattr(module, "gate", None))
    return all(extra is None or isinstance(extra, nn.Identity) for extra in extras)


def narrow(module: nn.Module, keep: Tensor) -> None:
    """Keep, in place, the hidden neurons (timm's Mlp) or the heads (Attention, WindowAttention) at `keep` (indices) only.

    Inputs and outputs keep their sizes. Exact where the layer that reads the others has zeros for them. Of block-sparse
    layers whole blocks should go: the others stay what they are. Raises ValueError where a norm or a gate stands between.
    """
    if not is_plain(module):
        raise ValueError(f"{type(module).__name__}: a norm or a gate stands between its layers: it cannot be made narrower")
    if isinstance(module, Mlp):
        module.fc1, module.fc2 = _rows(module.fc1, keep), _columns(module.fc2, keep)
        return
    assert isinstance(module, Attention | WindowAttention)
    head = module.proj.in_features // module.num_heads
    features = (keep[:, None] * head + torch.arange(head, device=keep.device)).flatten()
    thirds = module.proj.in_features * torch.arange(3, device=keep.device)
    module.qkv = _rows(module.qkv, (features + thirds[:, None]).flatten())
    module.proj = _columns(module.proj, features)
    module.num_heads = len(keep)
    if isinstance(module, Attention):
        module.attn_dim = len(features)
    else:
        table = module.relative_position_bias_table
        module.relative_position_bias_table = nn.Parameter(table.detach()[:, keep].clone(), table.requires_grad)


def dense_weight(layer: nn.Module) -> Tensor:
    """[out, in] of a linear layer, block-sparse or not; detached."""
    weight: Any = layer.weight
    dense: Tensor = weight.to_dense() if isinstance(weight, BlockSparseMatrix) else weight
    return dense.detach()


def _rows(layer: Any, keep: Tensor) -> Any:
    return _like(layer, dense_weight(layer)[keep], None if layer.bias is None else layer.bias.detach()[keep])


def _columns(layer: Any, keep: Tensor) -> Any:
    return _like(layer, dense_weight(layer)[:, keep], None if layer.bias is None else layer.bias.detach().clone())


def _like(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of the same kind, whose parameters are trained if those of `layer` are."""
    made: Any
    if isinstance(layer, BlockSparseLinear):
        made = BlockSparseLinear(BlockSparseMatrix.from_dense(weight, layer.weight.block), bias)
    else:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = nn.Parameter(weight.clone())
        made.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(getattr(layer, name).requires_grad)
    return made
