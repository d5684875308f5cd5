"""Transformer blocks whose element-wise work is done by the block-sparse products, while their results are at hand.

fc1 adds its bias and applies GELU; proj and fc2 add the bias, multiply by the LayerScale and add the residual.
"""

from __future__ import annotations

import copy
from typing import Any, TypeGuard, TypeVar, cast

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block, LayerScale
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli.sparse.layers import EpilogueLinear

Model = TypeVar("Model", bound=nn.Module)

# The parts of what is replaced: a timm that has more of them computes something else.
BLOCK = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
ATTENTION = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}  # older timm has no norm
MLP = {"fc1", "act", "drop1", "norm", "fc2", "drop2"}


def fuse(model: Model) -> Model:
    """A copy that computes the same with fewer passes over the activations, for timm models with block-sparse layers.

    Replaced are Mlp modules with exact GELU wherever they are (Swin's too), and the Block of vision_transformer. What has no
    block-sparse layer, or differs from these classes in any way, hooks on its parts included, stays as it is. Names and shapes
    of the state are those of the original, so that folders and checkpoints fit both. In training, under autocast (where the
    residual stream keeps its own, wider type) and with an attention mask, a Block runs as timm's does.
    """
    return cast(Model, _fused(copy.deepcopy(model)))


def _fused(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _fused(child))
    if any(isinstance(part, EpilogueLinear) for part in module.modules()):
        if _is_block(module):
            return FusedBlock(module)
        if _is_mlp(module):
            return FusedMlp(module)
    return module


class FusedMlp(Mlp):
    """timm's Mlp; its GELU is part of fc1 if that is block-sparse."""

    def __init__(self, mlp: Mlp):
        vars(self).update(vars(mlp))

    def hidden(self, x: Tensor) -> Tensor:  # [..., in] -> [..., hidden]
        fc1 = self.fc1
        x = fc1(x, activation="gelu") if isinstance(fc1, EpilogueLinear) else self.act(fc1(x))
        return self.norm(self.drop1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.hidden(x)))


class FusedBlock(Block):
    """timm's Block; LayerScale and residual are part of proj and of fc2 if these are block-sparse."""

    attn: Attention
    mlp: FusedMlp

    def __init__(self, block: Block):
        vars(self).update(vars(block))
        self.mlp = FusedMlp(cast(Mlp, block.mlp))

    def forward(self, x: Tensor, *mask: Any, **named_mask: Any) -> Tensor:  # [images, tokens, features]
        masked = any(m is not None and m is not False for m in (*mask, *named_mask.values()))
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        if self.training or autocast or masked:
            return super().forward(x, *mask, **named_mask)
        x = _add(self.attn.proj, _attended(self.attn, self.norm1(x)), self.ls1, x)
        return _add(self.mlp.fc2, self.mlp.hidden(self.norm2(x)), self.ls2, x)


def _attended(attn: Attention, x: Tensor) -> Tensor:
    """[images, tokens, features] -> what proj reads [images, tokens, heads * features of a head]."""
    q, k, v = attn.qkv(x).view(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    x = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v, scale=attn.scale)
    x = x.transpose(1, 2).flatten(2)
    return attn.norm(x) if hasattr(attn, "norm") else x


def _add(layer: nn.Module, x: Tensor, layer_scale: nn.Module, residual: Tensor) -> Tensor:
    """residual + layer_scale(layer(x))"""
    if isinstance(layer, EpilogueLinear):
        return layer(x, scale=getattr(layer_scale, "gamma", None), residual=residual)
    return residual + layer_scale(layer(x))


def _is_mlp(module: nn.Module) -> TypeGuard[Mlp]:
    if type(module) not in (Mlp, FusedMlp) or not _names(module) <= MLP or _hooked(module):
        return False
    return type(module.act) is nn.GELU and module.act.approximate == "none"


def _is_block(module: nn.Module) -> TypeGuard[Block]:
    if type(module) is not Block or _names(module) != BLOCK or _hooked(module):
        return False
    layer_scales = all(type(part) in (nn.Identity, LayerScale) for part in (module.ls1, module.ls2))
    attention = type(module.attn) is Attention and _names(module.attn) <= ATTENTION
    return layer_scales and attention and _is_mlp(module.mlp)


def _hooked(module: nn.Module) -> bool:
    """Whether hooks watch any of its parts, which would be skipped or see something else."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(part, kind) for part in module.modules() if part is not module for kind in kinds)


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
