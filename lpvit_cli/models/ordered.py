"""Modules that give their features in the original order, where the residual stream before them lies in another."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class Ordered(nn.Module):
    """Stands before the class of a module: what that gives at `order[i]` is feature i of its output. Names stay as they are."""

    order: Tensor  # [features] int64: saved with the weights

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given: Tensor = super().forward(*args, **kwargs)
        return given.index_select(-1, self.order)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (_plain(self),), self.__dict__


def give_in_order(module: nn.Module, order: Tensor) -> None:
    """Gather, in place, the features of the output at `order` [features], after what is gathered already; none if that is all
    in place."""
    if isinstance(module, Ordered):
        order = module.order[order.to(module.order.device)]
        del module.order
        _become(module, _plain(module))
    if not torch.equal(order, torch.arange(len(order), device=order.device)):
        device = next((tensor.device for tensor in module.parameters()), order.device)
        kind: Any = type(module)
        _become(module, _ordered(kind))
        module.register_buffer("order", order.to(device))


def ordered_modules(model: nn.Module) -> list[str]:
    """The names of the modules that gather."""
    return [name for name, module in model.named_modules() if isinstance(module, Ordered)]


def is_permutation(order: Tensor, size: int) -> bool:
    return order.dtype == torch.int64 and order.ndim == 1 and torch.equal(order.sort().values, torch.arange(size))


def _become(module: Any, kind: type[nn.Module]) -> None:
    module.__class__ = kind


@cache
def _ordered(plain: Any) -> type[nn.Module]:
    return type(f"Ordered{plain.__name__}", (Ordered, plain), {"__module__": plain.__module__})


def _plain(module: Ordered) -> type[nn.Module]:
    plain: type[nn.Module] = type(module).__bases__[1]
    return plain


def _empty(plain: Any) -> nn.Module:
    kind = _ordered(plain)
    return kind.__new__(kind)
