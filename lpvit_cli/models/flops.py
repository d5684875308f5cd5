"""What a model multiplies and adds for one image."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one image, of the model and of the products within each attention module; tokens each linear layer sees."""

    total: int
    tokens: dict[str, int]
    attention: dict[str, int]


def count_flops(model: nn.Module, layers: Iterable[str], example: Tensor | None = None) -> ModelFlops:
    """Count on the meta device, where attention is plain matrix products (the CPU's fused attention escapes the counter).

    FLOPs are those of matrix products and convolutions, attention included; one multiply-add is two FLOPs (papers that call
    a multiply-add one FLOP print half of it). `layers`: names of linear layers, block-sparse ones too, whose tokens are told.
    `example`: an input of one image; None: an image of the size in `model.pretrained_cfg`.
    """
    tokens: dict[str, int] = {}
    meta = _meta_copy(model).float()
    cfg: Any = model.pretrained_cfg if example is None else None
    size = cfg["input_size"] if example is None else example.shape[1:]
    for name in layers:
        meta.get_submodule(name).register_forward_hook(
            lambda _, x, y, name=name: tokens.__setitem__(name, tokens.get(name, 0) + x[0].numel() // x[0].shape[-1])
        )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counter = FlopCounterMode(display=False)
        with counter:
            meta(torch.empty(1, *size, device="meta"))
    products = {
        name.partition(".")[2]: sum(flops for operation, flops in counts.items() if operation is torch.ops.aten.bmm)
        for name, counts in counter.get_flop_counts().items()
    }
    return ModelFlops(counter.get_total_flops(), tokens, {name: flops for name, flops in products.items() if flops})


def _meta_copy(model: nn.Module) -> nn.Module:
    """The same modules with tensors that hold no data."""
    memo = {id(t): torch.empty_like(t, device="meta") for t in [*model.parameters(), *model.buffers()]}
    memo |= {id(p): nn.Parameter(memo[id(p)], requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)
