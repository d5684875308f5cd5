"""LoRA-GA's start: factors whose first step is the best low-rank step along the gradient (arXiv 2407.05000), masked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from lpvit_kernels import BlockSparseMatrix
from torch import Tensor, nn

from lpvit_cli import distributed
from lpvit_cli.sparse import BlockSparseLinear, sparse_layers

MEMORY_BYTES = 256 * 2**20  # of gradients that exist at once, unless one layer's is larger
OVERSAMPLING, ITERATIONS = 16, 4  # of the randomized SVD (Halko et al., arXiv 0909.4061)
Batches = Iterable[tuple[Tensor, Tensor]]  # images [n, 3, H, W], labels [n]


def kept_gradients(
    model: nn.Module,
    names: Iterable[str],
    batches: Callable[[], Batches],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    memory_bytes: int = MEMORY_BYTES,
) -> Iterator[tuple[str, BlockSparseMatrix]]:
    """M o dL/dW of the named block-sparse layers, averaged over images, a few layers at a time; kept blocks only are computed.

    Layers share a pass over `batches()`, the same ones every time, as far as their gradients fit into `memory_bytes` together.
    `loss_of(images, labels)` is the mean loss. With several processes, each with batches of its own, the images of all count.
    Each gradient is valid until the next is asked for. All parameters are frozen, and are left so.
    """
    layers = {name: sparse_layers(model)[name] for name in names}
    model.requires_grad_(False)
    for group in _groups(layers, memory_bytes):
        values = [layers[name].values.requires_grad_() for name in group]
        sums, images = [torch.zeros_like(v) for v in values], torch.tensor(0)
        for x, labels in batches():
            if len(x):
                for total, gradient in zip(sums, torch.autograd.grad(loss_of(x, labels), values), strict=True):
                    total.add_(gradient, alpha=len(x))
                images += len(x)
        model.requires_grad_(False)
        distributed.all_reduce(images, *sums)
        for name in group:
            yield name, layers[name].weight.with_values(sums.pop(0).div_(images))


def _groups(layers: dict[str, BlockSparseLinear], memory_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = []
    left = 0
    for name, layer in layers.items():
        size = layer.values.numel() * layer.values.element_size()
        if size > left or not groups:
            groups.append([])
            left = memory_bytes
        groups[-1].append(name)
        left -= size
    return groups


@torch.no_grad()
def lora_ga_factors(gradient: BlockSparseMatrix, rank: int, gamma: float = 16.0) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] from the singular vectors of the masked gradient Gm = U s V^T [out, in].

    A = V[:, :r]^T c, B = U[:, r:2r] c, c = out^(1/4) / sqrt(gamma) (LoRA-GA, section 3.3). The singular values are not used.
    Where 2r is small against the layer, the SVD is a randomized one. Raises ValueError for ranks above min(out, in) / 2.
    """
    out, smaller = gradient.shape[0], min(gradient.shape)
    if 2 * rank > smaller:
        raise ValueError(f"LoRA-GA needs 2 x rank <= min(out, in): rank {rank}, min(out, in) {smaller}")
    wanted = 2 * rank + OVERSAMPLING
    if 4 * wanted <= smaller:
        u, _, v = torch.svd_lowrank(gradient.to_dense(), wanted, ITERATIONS)
    else:
        u, _, vh = torch.linalg.svd(gradient.to_dense(), full_matrices=False)
        v = vh.T
    u, v = u[:, : 2 * rank], v[:, : 2 * rank]
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    u, v = u * largest.sign(), v * largest.sign()  # the sign is free: chosen, other processes and machines start alike
    scale = out**0.25 / gamma**0.5
    return v[:, :rank].T * scale, u[:, rank:] * scale
