"""Output-gradient second moments: S = 1/N sum d d^T, K-FAC's output factor (arXiv 1503.05671)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from lpvit_cli import distributed
from lpvit_cli.devices import autocast
from lpvit_cli.tasks.base import Loss

TokenWeights = dict[str, list[Tensor]]  # by layer, in the order of batches: |d|^2 [tokens] of each token


def observe_outputs(layer: nn.Module, into: Tensor, on_tokens: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Add d^T d to `into` in every backward pass; d [tokens, out] the gradient of the output. `into` [rows, R, R]: only the
    blocks of R outputs on the diagonal; R = out is all of it. `on_tokens` is told the inputs x [tokens, in] and |d|^2 [tokens],
    float32."""
    rows, height, _ = into.shape

    def add(d: Tensor, x: Tensor) -> None:
        on_tokens(x.flatten(0, -2), d.float().flatten(0, -2).square().sum(dim=1))
        d = F.pad(d.flatten(0, -2), (0, rows * height - d.shape[-1])).unflatten(1, (rows, height)).transpose(0, 1)
        into.add_(torch.bmm(d.mT, d))  # of bfloat16 gradients in bfloat16: its rounding is nothing beside that of few images

    def observe(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(partial(add, x=inputs[0].detach()))

    return layer.register_forward_hook(observe)


def _append(to: list[Tensor], x: Tensor, weights: Tensor) -> None:
    to.append(weights)


def output_moments(
    model: nn.Module,
    heights: Mapping[str, int],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], TokenWeights]:
    """Sum over tokens of d^T d [out, out] of each named layer, as calibration sums it, of a model that is no longer dense; zero
    but for the blocks of so many outputs on the diagonal, which is what costs of block rows of that height are made of. And
    |d|^2 of every token.

    With several processes, each with batches of its own, the sums are those of all images, the tokens those of its own.
    Weights get no gradient: a backward pass costs as much as the forward pass.
    """
    model.eval().requires_grad_(False).to(device)
    sums, handles, outputs = {}, [], {}
    tokens: TokenWeights = {name: [] for name in heights}
    for name, height in heights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        outputs[name] = layer.out_features
        sums[name] = torch.zeros(-(-layer.out_features // height), height, height, device=device)
        handles.append(observe_outputs(layer, sums[name], partial(_append, tokens[name])))
    try:
        for images, labels in batches:
            with autocast(device, dtype):
                given = model(images.to(device).detach().requires_grad_())
            loss(given.float(), labels).backward()
    finally:
        for handle in handles:
            handle.remove()
    distributed.all_reduce(*sums.values())
    return {name: torch.block_diag(*blocks)[: outputs[name], : outputs[name]] for name, blocks in sums.items()}, tokens
