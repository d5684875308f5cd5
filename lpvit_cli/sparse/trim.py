"""Hidden neurons and attention heads that pruning has left without a purpose go, before the model is run or exported.

Without a purpose is what nothing reads, its columns of fc2 or proj being zero; and what never changes, its rows of fc1 or of
the values being zero: what it adds to each output is then a constant, and becomes part of the bias.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any, TypeVar

import torch
from timm.layers import Mlp
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from lpvit_cli.sparse.layers import BlockSparseLinear
from lpvit_cli.sparse.narrow import dense_weight, is_plain, narrow

Model = TypeVar("Model", bound=nn.Module)


def trim(model: Model) -> Model:
    """A copy, smaller where that changes no output and cuts no kept block. For inference: a constant has no gradient.

    Looked at are timm's Mlp, Attention and WindowAttention without a norm or a gate in between, whose layers are theirs alone.
    """
    model = copy.deepcopy(model)
    uses = Counter(part for _, part in model.named_modules(remove_duplicate=False))
    with torch.no_grad():
        for module in model.modules():
            if not is_plain(module) or any(uses[part] > 1 for part in module.children() if _is_linear(part)):
                continue
            if isinstance(module, Mlp):
                _trim_neurons(module)
            elif isinstance(module, Attention | WindowAttention):
                _trim_heads(module)
    return model


def order_neurons(model: nn.Module) -> None:
    """Sort, in place, hidden neurons by how many blocks their block row of fc1 keeps, where that cuts no block of fc2.

    Exact: rows of fc1 and columns of fc2 move together.
    """
    for mlp in model.modules():
        if isinstance(mlp, Mlp) and isinstance(mlp.norm, nn.Identity) and isinstance(mlp.fc1, BlockSparseLinear):
            height, hidden = _block(mlp.fc1)[0], mlp.fc1.out_features
            if hidden % height == 0 and height % _block(mlp.fc2)[1] == 0:
                order = mlp.fc1.row_ptr.diff().argsort(stable=True)
                narrow(mlp, (order[:, None] * height + torch.arange(height, device=order.device)).flatten())


def _trim_neurons(mlp: Mlp) -> None:
    fc1: Any = mlp.fc1
    fc2: Any = mlp.fc2
    if not _any_sparse(fc1, fc2):
        return
    group = math.lcm(_block(fc1)[0], _block(fc2)[1])
    if fc1.out_features % group:
        return
    constants = mlp.act(_bias(fc1).clone())  # of hidden neurons with empty rows
    if len(keep := _worth_keeping(dense_weight(fc1), constants, fc2, group)) < fc1.out_features:
        narrow(mlp, keep)


def _trim_heads(attention: Attention | WindowAttention) -> None:
    qkv, proj = attention.qkv, attention.proj
    head, features = proj.in_features // attention.num_heads, proj.in_features
    if not _any_sparse(qkv, proj) or qkv.out_features != 3 * features:
        return
    group = math.lcm(head, _block(qkv)[0], _block(proj)[1])
    if features % group:
        return
    values, constants = dense_weight(qkv)[-features:], _bias(qkv)[-features:]  # the weights of attention add up to one
    keep = _worth_keeping(values, constants, proj, group)
    if len(keep) < features:
        narrow(attention, keep[::head] // head)


def _worth_keeping(producer: Tensor, constants: Tensor, consumer: Any, group: int) -> Tensor:
    """Indices of features to keep, whole groups of `group` and at least one; `consumer` takes constants into its bias.

    producer [features, in]: where a row is zero, the feature is that of `constants` [features].
    """
    weight = dense_weight(consumer)  # [out, features]
    unread, constant = (weight == 0).all(dim=0), (producer == 0).all(dim=1)
    if consumer.bias is None:
        constant &= constants == 0
    gone = (unread | constant).view(-1, group).all(dim=1)
    if gone.all():
        gone[0] = False
    gone = gone.repeat_interleave(group)
    if consumer.bias is not None:
        added = gone & ~unread  # what nothing reads adds nothing, infinite or not
        bias = consumer.bias + weight[:, added] @ constants[added].to(weight.dtype)
        consumer.bias = nn.Parameter(bias, consumer.bias.requires_grad)  # of its own: the old one may be another layer's too
    return (~gone).nonzero()[:, 0]


def _any_sparse(*layers: nn.Module) -> bool:
    """Of linear layers only: an Mlp may hold convolutions."""
    return all(_is_linear(layer) for layer in layers) and any(isinstance(layer, BlockSparseLinear) for layer in layers)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | BlockSparseLinear)


def _block(layer: nn.Module) -> tuple[int, int]:
    return layer.weight.block if isinstance(layer, BlockSparseLinear) else (1, 1)


def _bias(layer: Any) -> Tensor:
    """[out], zeros if it has none."""
    return torch.zeros(layer.out_features, device=dense_weight(layer).device) if layer.bias is None else layer.bias.detach()
