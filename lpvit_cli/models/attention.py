"""Attention as plain matrix products, where a fused one cannot be written to a file."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def unfused(model: nn.Module) -> nn.Module | None:
    """A copy whose attention is written out, equal to rounding; None where none of it is fused.

    By the libraries' own switches: `fused_attn` of timm's modules, the attention implementation in transformers' configs.
    """
    model = copy.deepcopy(model)
    changed = False
    parts: list[Any] = list(model.modules())
    for part in parts:
        if getattr(part, "fused_attn", False):
            part.fused_attn, changed = False, True
        config: Any = getattr(part, "config", None)
        if getattr(config, "_attn_implementation", None) not in (None, "eager"):
            config._attn_implementation, changed = "eager", True
    return model if changed else None
