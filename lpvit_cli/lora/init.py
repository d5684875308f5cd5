"""LoRA-GA's start: adapters whose first step is the best low-rank step along the gradient (arXiv 2407.05000), masked."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from lpvit_kernels import BlockSparseMatrix
from torch import Tensor, nn

from lpvit_cli.lora.layers import MaskedLoraLinear
from lpvit_cli.sparse import sparse_layers


def kept_gradients(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss_of: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, BlockSparseMatrix]:
    """M o dL/dW of every block-sparse layer, averaged over `batches`; only kept blocks are ever computed.

    `loss_of(images, labels)` returns a scalar loss of the model.
    """
    layers = sparse_layers(model)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.values.requires_grad_(True).grad = None
    count = 0
    for images, labels in batches:
        loss_of(images, labels).backward()
        count += 1
    gradients = {}
    for name, layer in layers.items():
        assert layer.values.grad is not None
        gradients[name] = layer.weight.with_values(layer.values.grad / count)
        layer.values.grad = None
    return gradients


@torch.no_grad()
def lora_ga_init(adapter: MaskedLoraLinear, gradient: BlockSparseMatrix, gamma: float = 16.0) -> None:
    """Start A and B from the singular vectors of the masked gradient Gm = U s V^T [out, in]; W0 absorbs their product.

    A = V[:, :r]^T c, B = U[:, r:2r] c, c = out^(1/4) / sqrt(gamma) (LoRA-GA, section 3.3); then W0 -= eta M o (B A), so the
    output is unchanged. The singular values are not used. Ranks above min(out, in) / 2 have no such start: ValueError.
    """
    rank = adapter.rank
    u, _, vh = torch.linalg.svd(gradient.to_dense(), full_matrices=False)
    if 2 * rank > len(vh):
        raise ValueError(f"LoRA-GA needs 2 x rank <= min(out, in): rank {rank}, min(out, in) {len(vh)}")
    scale = adapter.base.out_features**0.25 / gamma**0.5
    adapter.lora_a.copy_(vh[:rank] * scale)
    adapter.lora_b.copy_(u[:, rank : 2 * rank] * scale)
    adapter.base.values.sub_(adapter.delta_values())
