"""Output-gradient second moments: S = 1/N sum d d^T, K-FAC's output factor (arXiv 1503.05671)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lpvit_cli.tasks.base import Loss


def observe_outputs(layer: nn.Module, into: Tensor) -> RemovableHandle:
    """Add d^T d to `into` [out, out] in every backward pass; d [tokens, out] the gradient of the output."""

    def add(d: Tensor) -> None:
        d = d.float().flatten(0, -2)
        into.addmm_(d.T, d)

    def observe(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(add)

    return layer.register_forward_hook(observe)


def output_moments(
    model: nn.Module, layers: Iterable[str], batches: Iterable[tuple[Tensor, Tensor]], loss: Loss, device: torch.device
) -> dict[str, Tensor]:
    """Sum over tokens of d^T d [out, out] of each named layer, as calibration sums it, of a model that is no longer dense.

    Weights get no gradient: a backward pass costs as much as the forward pass.
    """
    model.eval().requires_grad_(False).to(device)
    sums, handles = {}, []
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        sums[name] = torch.zeros(layer.out_features, layer.out_features, device=device)
        handles.append(observe_outputs(layer, sums[name]))
    try:
        for images, labels in batches:
            loss(model(images.to(device).detach().requires_grad_()), labels).backward()
    finally:
        for handle in handles:
            handle.remove()
    return sums
