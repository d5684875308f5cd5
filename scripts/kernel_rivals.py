"""A transformer's linear layer with all that follows it, as PyTorch computes it: rivals of the block-sparse kernels.

dense      F.linear (cuBLAS, or a CPU's BLAS), then GELU or the residual as operators of their own
compiled   the same through torch.compile, which fuses what follows
mkldnn     CPUs: oneDNN with packed weights and GELU fused, as torch.compile calls it when weights are frozen
bsr        GPUs: torch.sparse's own block-sparse product, bsr_dense_addmm, as it comes
bsr tuned  the same, the fastest of its parameters
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from lpvit_kernels import BlockSparseMatrix
from torch import Tensor
from torch.nn import functional as F

from lpvit_cli.measure.timing import time_interleaved

Call = Callable[[], Tensor]
BSR_ROWS = 128  # its tokens must be a multiple of its tiles': they are padded outside of the timing


@dataclass(frozen=True)
class Layer:
    """A linear layer of a transformer block, and what follows it."""

    name: str
    out: int
    features: int
    gelu: bool = False
    adds: bool = False  # to the residual stream


def layers_of(width: int) -> list[Layer]:
    return [
        Layer("qkv", 3 * width, width),
        Layer("proj", width, width, adds=True),
        Layer("fc1", 4 * width, width, gelu=True),
        Layer("fc2", width, 4 * width, adds=True),
    ]


@dataclass(frozen=True)
class Problem:
    """Random data: x [tokens, features], bias [out], residual [tokens, out] or None."""

    layer: Layer
    x: Tensor
    bias: Tensor
    residual: Tensor | None

    @classmethod
    def random(cls, layer: Layer, tokens: int, device: torch.device, dtype: torch.dtype) -> Problem:
        x = torch.randn(tokens, layer.features, device=device).mul_(layer.features**-0.5).to(dtype)
        bias = torch.randn(layer.out, device=device, dtype=dtype)
        return cls(layer, x, bias, torch.randn(tokens, layer.out, device=device, dtype=dtype) if layer.adds else None)

    def finish(self, y: Tensor) -> Tensor:
        """What follows the linear layer."""
        y = F.gelu(y) if self.layer.gelu else y
        return y if self.residual is None else y + self.residual.to(y.dtype)

    def reference(self, weight: Tensor) -> Tensor:
        """In float64."""
        return self.finish(F.linear(self.x.double(), weight.double(), self.bias.double()))


def dense_rivals(problem: Problem, weight: Tensor) -> dict[str, Call]:
    """Of a full weight [out, in]: the same random numbers everywhere, no zeros, which would run faster."""
    torch._dynamo.reset()  # else a handful of shapes later it would no longer compile, without a word

    def forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        y = F.linear(x, weight, bias)
        y = F.gelu(y) if problem.layer.gelu else y
        return y if residual is None else y + residual

    data = (problem.x, weight, problem.bias, problem.residual)
    compiled = torch.compile(forward, fullgraph=True, dynamic=False)
    calls: dict[str, Call] = {"dense": lambda: forward(*data), "compiled": lambda: compiled(*data)}
    if problem.x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        calls["mkldnn"] = _mkldnn(problem, weight)
    return calls


def _mkldnn(problem: Problem, weight: Tensor) -> Call:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(problem.x))
    follows: tuple[Any, ...] = ("gelu", [], "none") if problem.layer.gelu else ("none", [], "")

    def forward() -> Tensor:
        y = torch.ops.mkldnn._linear_pointwise(problem.x, packed, problem.bias, *follows)
        return y if problem.residual is None else y + problem.residual

    return forward


def bsr_rivals(problem: Problem, weight: BlockSparseMatrix, tuned: bool) -> dict[str, Call]:
    """PyTorch's block-sparse product. It computes y^T = W x^T + b, so that what follows reads a transposed y.

    torch's own helper for tuning it takes minutes a case; the parameters it would vary are tried on a grid here.
    """
    from torch.sparse._triton_ops import bsr_dense_addmm

    tokens, height = len(problem.x), weight.block[0]
    padded = F.pad(problem.x, (0, 0, 0, -tokens % BSR_ROWS)).T  # [features, padded tokens]
    bias = problem.bias[:, None].expand(-1, padded.shape[1])
    bsr = weight.to_dense().to_sparse_bsr(weight.block)

    def call(meta: dict[str, int] | None) -> Call:
        return lambda: problem.finish(bsr_dense_addmm(bias, bsr, padded, meta=meta).T[:tokens])

    calls = {"bsr": call(None)}
    if tuned:
        tried: dict[str, Call] = {}
        for stages, warps, tile in product((1, 2, 3), (4, 8), sorted({height, BSR_ROWS})):
            meta = {"SPLIT_N": padded.shape[1] // tile, "GROUP_SIZE_ROW": 4, "num_stages": stages, "num_warps": warps}
            if works(call(meta)) is None:
                tried[str(meta)] = call(meta)
        if tried:
            run = time_interleaved(dict(tried), device=padded.device, rounds=7, warmup_seconds=0.02)
            calls["bsr tuned"] = tried[min(tried, key=lambda name: run.subjects[name].median_ms)]
    return calls


def works(call: Callable[[], Any]) -> str | None:
    """Why a call of foreign code fails; None: it does not."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None
