"""`MaskedLoraLinear`: W_eff = M o (W0 + eta B A), formed on the kept blocks only."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from lpvit_kernels import BlockSparseMatrix, kept_product, linear
from torch import Tensor, nn

from lpvit_cli.sparse import BlockSparseLinear


class MaskedLoraLinear(nn.Module):
    """A frozen block-sparse weight plus a trainable low-rank product restricted to its kept blocks.

    W0 [out, in] with blocks R x C, A [r, in], B [out, r], eta = alpha / sqrt(r) (rank-stabilised, arXiv 2312.03732). Kept
    block (i, j) is W0_ij + eta B_i A_j; M o (B A) itself is not low-rank and is never formed as a dense matrix. Starts as
    plain LoRA (A Gaussian, B zero); see `start` for the start from the gradient.
    """

    start_a: Tensor
    start_b: Tensor

    def __init__(self, base: BlockSparseLinear, rank: int, alpha: float = 16.0):
        super().__init__()
        self.base = base
        self.base.values.requires_grad_(False)
        self.rank = rank
        self.eta = alpha / math.sqrt(rank)
        like = base.values
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features, dtype=like.dtype, device=like.device) / rank)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=like.dtype, device=like.device))
        self.register_buffer("start_a", torch.zeros_like(self.lora_a))
        self.register_buffer("start_b", torch.zeros_like(self.lora_b))

    @torch.no_grad()
    def start(self, a: Tensor, b: Tensor) -> None:
        """Start from these factors, A [r, in] and B [out, r]; W0 absorbs their product, so that the output is unchanged."""
        for factor, given in ((self.lora_a, a), (self.lora_b, b), (self.start_a, a), (self.start_b, b)):
            factor.copy_(given)
        self.base.values.sub_(self.delta_values())

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """A' [r', in] and B' [out, r'] whose product is all that was added to the weight as it was before `start`."""
        if not self.start_b.any():
            return self.lora_a, self.eta * self.lora_b
        return torch.cat([self.lora_a, self.start_a]), self.eta * torch.cat([self.lora_b, -self.start_b], dim=1)

    def delta_values(self) -> Tensor:
        """eta B_i A_j on the kept blocks, packed [nnz, R, C]; differentiable in A and B.

        In their own type also under autocast: W0 nearly cancels it at first, and rounding it before the sum would show.
        """
        return self.eta * kept_product(self.lora_b, self.lora_a, self.base.weight)

    def delta_weight(self) -> BlockSparseMatrix:
        """M o (eta B A) as a block-sparse matrix [out, in]."""
        return self.base.weight.with_values(self.delta_values())

    def effective_weight(self) -> BlockSparseMatrix:
        """M o (W0 + eta B A) as a block-sparse matrix [out, in]."""
        return self.base.weight.with_values(self.base.values + self.delta_values())

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        weight = self.effective_weight()
        with self._weight_made_again():
            return linear(x, weight, self.base.bias)

    def _weight_made_again(self) -> AbstractContextManager[None]:
        """The backward pass forms W_eff anew: kept until then, those of all layers would take as much memory as the model."""
        shape = self.base.values.shape

        def pack(saved: Tensor) -> Tensor | torch.dtype:
            return saved.dtype if saved.shape == shape else saved  # under autocast it was converted

        def unpack(packed: Tensor | torch.dtype) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            with torch.no_grad():
                return self.effective_weight().values.to(packed)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    @torch.no_grad()
    def merge(self) -> BlockSparseLinear:
        """The block-sparse layer with the adapter added in; same mask, same output."""
        self.base.values.add_(self.delta_values())
        self.base.values.requires_grad_(True)
        return self.base


def adapt(model: nn.Module, ranks: dict[str, int], alpha: float) -> dict[str, MaskedLoraLinear]:
    """Put an adapter of its rank on each named block-sparse layer, in place."""
    adapters = {}
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, BlockSparseLinear)
        adapters[name] = MaskedLoraLinear(layer, rank, alpha)
        model.set_submodule(name, adapters[name])
    return adapters


def adapters_of(model: nn.Module) -> dict[str, MaskedLoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLoraLinear)}


def merge(model: nn.Module) -> None:
    """Replace every adapter by its merged block-sparse layer, in place."""
    for name, adapter in adapters_of(model).items():
        model.set_submodule(name, adapter.merge())
