"""Physically smaller modules: an MLP with fewer hidden neurons, an attention with fewer heads. Exact: what goes was unused."""

from __future__ import annotations

import torch
from timm.layers import Mlp
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


def width(module: nn.Module) -> int | None:
    """Hidden neurons of an MLP or heads of an attention: what `narrow` makes fewer; None for other modules."""
    if isinstance(module, Mlp):
        neurons = getattr(module.fc1, "out_features", None)  # a convolution has none
        assert neurons is None or isinstance(neurons, int)
        return neurons
    return module.num_heads if isinstance(module, Attention | WindowAttention) else None


def narrow(module: nn.Module, keep: Tensor) -> None:
    """Keep, in place, the hidden neurons (timm's Mlp) or the heads (Attention, WindowAttention) at `keep` (indices) only.

    Inputs and outputs keep their sizes. Exact where the layer that reads the others has zeros for them.
    """
    if isinstance(module, Mlp):
        assert isinstance(module.fc1, nn.Linear)
        assert isinstance(module.fc2, nn.Linear)
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


def _rows(layer: nn.Linear, keep: Tensor) -> nn.Linear:
    return _linear(layer.weight.detach()[keep], None if layer.bias is None else layer.bias.detach()[keep])


def _columns(layer: nn.Linear, keep: Tensor) -> nn.Linear:
    return _linear(layer.weight.detach()[:, keep], None if layer.bias is None else layer.bias.detach())


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.clone())
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias.clone()))
    return made
