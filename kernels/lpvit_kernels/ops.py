"""The one public operation, and which backend computes it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lpvit_kernels import cpu, reference
from lpvit_kernels.matrix import BlockSparseMatrix

BACKENDS = {"cpu": cpu.linear, "reference": reference.linear}


def linear(
    x: Tensor,
    weight: BlockSparseMatrix,
    bias: Tensor | None = None,
    activation: Literal["gelu"] | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = act(x W^T + b) [+ residual]; x [..., in], bias [out], residual and y [..., out]; differentiable in all of them.

    `backend`: "cpu", "reference", or "auto" (cpu for CPU tensors; elsewhere the reference, until there is a GPU kernel).
    `activation`: "gelu" is the exact one, with erf. Under autocast it computes in the autocast type, as F.linear does.
    Raises ValueError when shapes, types, devices or the backend do not fit.
    """
    if backend == "auto":
        backend = "cpu" if x.device.type == "cpu" else "reference"
    if backend not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"unknown backend {backend!r}: use one of {known} (a triton backend is not built yet)")
    if activation not in (None, "gelu"):
        raise ValueError(f"activation must be None or 'gelu', got {activation!r}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.shape[1]}")
    if backend == "cpu" and x.device.type != "cpu":
        raise ValueError(f"the cpu backend needs CPU tensors, x is on {x.device}")
    if x.device != weight.values.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.values.device}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.with_values(weight.values.to(dtype))
        bias = None if bias is None else bias.to(dtype)
    if x.dtype != weight.values.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(
            f"x is {x.dtype}, the weight {weight.values.dtype}, the bias {bias.dtype if bias is not None else None}"
        )
    out = (*x.shape[:-1], weight.shape[0])
    if bias is not None and bias.shape != out[-1:]:
        raise ValueError(f"bias must be {list(out[-1:])}, got {list(bias.shape)}")
    if residual is not None and residual.shape != out:
        raise ValueError(f"residual must be {list(out)}, got {list(residual.shape)}")
    y = BACKENDS[backend](x.reshape(-1, x.shape[-1]), weight, bias).reshape(out)
    if activation == "gelu":
        y = F.gelu(y)
    return y if residual is None else y + residual
