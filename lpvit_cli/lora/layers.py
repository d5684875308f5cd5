"""`MaskedLoraLinear`: W_eff = M o (W0 + eta B A), formed on the kept blocks only."""

from __future__ import annotations

import math

import torch
from lpvit_kernels import BlockSparseMatrix, linear
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli.sparse import BlockSparseLinear, sparse_layers


class MaskedLoraLinear(nn.Module):
    """A frozen block-sparse weight plus a trainable low-rank product restricted to its kept blocks.

    W0 [out, in] with blocks R x C, A [r, in], B [out, r], eta = alpha / sqrt(r) (rank-stabilised, arXiv 2312.03732). Kept
    block (i, j) is W0_ij + eta B_i A_j; M o (B A) itself is not low-rank and is never formed as a dense matrix. Starts as
    plain LoRA (A Gaussian, B zero); see `lora_ga_init` for the start from the gradient.
    """

    def __init__(self, base: BlockSparseLinear, rank: int, alpha: float = 16.0):
        super().__init__()
        self.base = base
        self.base.values.requires_grad_(False)
        self.rank = rank
        self.eta = alpha / math.sqrt(rank)
        like = base.values
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features, dtype=like.dtype, device=like.device) / rank)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=like.dtype, device=like.device))

    def delta_values(self) -> Tensor:
        """eta B_i A_j on the kept blocks, packed [nnz, R, C]; differentiable in A and B."""
        weight = self.base.weight
        _, block_rows, block_cols = weight.values.shape
        a = _pad_to_multiple(self.lora_a.T, block_cols).unflatten(0, (-1, block_cols))  # [in/C, C, r]
        b = _pad_to_multiple(self.lora_b, block_rows).unflatten(0, (-1, block_rows))  # [out/R, R, r]
        with torch.autocast(a.device.type, enabled=False):  # W0 nearly cancels it: rounding it first would show
            return self.eta * torch.bmm(b[weight.block_rows], a[weight.cols.long()].transpose(1, 2))

    def delta_weight(self) -> BlockSparseMatrix:
        """M o (eta B A) as a block-sparse matrix [out, in]."""
        return self.base.weight.with_values(self.delta_values())

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        weight = self.base.weight.with_values(self.base.values + self.delta_values())
        return linear(x, weight, self.base.bias)

    @torch.no_grad()
    def merge(self) -> BlockSparseLinear:
        """The block-sparse layer with the adapter added in; same mask, same output."""
        self.base.values.add_(self.delta_values())
        self.base.values.requires_grad_(True)
        return self.base


def adapt(model: nn.Module, rank: int, alpha: float) -> dict[str, MaskedLoraLinear]:
    """Put an adapter on every block-sparse layer, in place. Adapters, biases and norms train; all else is frozen."""
    adapters = {name: MaskedLoraLinear(layer, rank, alpha) for name, layer in sparse_layers(model).items()}
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.ndim == 1 or name.endswith((".lora_a", ".lora_b")))
    return adapters


def merge(model: nn.Module) -> None:
    """Replace every adapter by its merged block-sparse layer, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MaskedLoraLinear):
            model.set_submodule(name, module.merge())


def _pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    return F.pad(x, (0, 0, 0, -len(x) % multiple))
