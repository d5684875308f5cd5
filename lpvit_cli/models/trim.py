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
from torch import Tensor, nn

from lpvit_cli.models.coupled import Coupled, coupled
from lpvit_cli.models.narrow import dense_weight, narrow
from lpvit_cli.sparse.layers import BlockSparseLinear

Model = TypeVar("Model", bound=nn.Module)


def trim(model: Model) -> Model:
    """A copy, smaller where that changes no output and cuts no kept block. For inference: a constant has no gradient.

    Looked at are the MLPs and attentions that `coupled` knows, without a norm or a gate in between, whose layers are theirs
    alone.
    """
    model = copy.deepcopy(model)
    uses = Counter(part for _, part in model.named_modules(remove_duplicate=False))
    with torch.no_grad():
        for module in model.modules():
            found = coupled(module)
            if found and found.plain and all(uses[layer] == 1 for layer in _layers(module, found)):
                _trim(module, found)
    return model


def order_neurons(model: nn.Module) -> None:
    """Sort, in place, hidden neurons by how many blocks their block row of fc1 keeps, where that cuts no block of fc2.

    Exact: rows of fc1 and columns of fc2 move together.
    """
    for mlp in model.modules():
        found = coupled(mlp)
        if found is None or found.heads or not found.plain or len(found.producers) > 1:
            continue
        producer, consumer = _layers(mlp, found)
        height = _block(producer)[0]
        if isinstance(producer, BlockSparseLinear) and found.units % height == 0 and height % _block(consumer)[1] == 0:
            order = producer.row_ptr.diff().argsort(stable=True)
            narrow(mlp, (order[:, None] * height + torch.arange(height, device=order.device)).flatten())


def _trim(module: nn.Module, found: Coupled) -> None:
    *producers, consumer = _layers(module, found)
    if not any(isinstance(layer, BlockSparseLinear) for layer in (*producers, consumer)):
        return
    group = math.lcm(found.width, *(_block(layer)[0] for layer in producers), _block(consumer)[1])
    if found.features % group:
        return
    last = producers[-1]  # qkv, or v: its last rows make the values
    values, constants = dense_weight(last)[-found.features :], _bias(last)[-found.features :]
    if found.activation is not None:  # of hidden neurons with empty rows
        constants = found.activation(constants.clone())
    elif not found.heads:  # the product with a gate: only zero is a constant
        values, constants = torch.ones_like(values), torch.zeros_like(constants)
    keep = _worth_keeping(values, constants, consumer, group)  # of heads: the weights of attention add up to one
    if len(keep) < found.features:
        narrow(module, keep[:: found.width] // found.width)


def _layers(module: nn.Module, found: Coupled) -> list[Any]:
    """The producers, then the consumer."""
    return [getattr(module, name) for name in (*found.producers, found.consumer)]


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


def _block(layer: nn.Module) -> tuple[int, int]:
    return layer.weight.block if isinstance(layer, BlockSparseLinear) else (1, 1)


def _bias(layer: Any) -> Tensor:
    """[out], zeros if it has none."""
    return torch.zeros(layer.out_features, device=dense_weight(layer).device) if layer.bias is None else layer.bias.detach()
