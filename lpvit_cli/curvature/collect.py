"""One pass over calibration images: hooks on the prunable layers sum what LayerStatistics holds.

Per-image losses are summed over the batch, so every gradient is that of single images; the weight gradient is summed by
autograd into `weight.grad`. Memory beyond the model: one [in, in] and one [out, in] per layer and the activations of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli.curvature.statistics import FIELDS, LayerStatistics
from lpvit_cli.errors import CheckFailed, UsageError

Gradient = Literal["logits", "empirical", "sampled"]


def loss_of(logits: Tensor, labels: Tensor, gradient: Gradient, generator: torch.Generator) -> Tensor:
    """Sum over the batch of the loss whose curvature is taken; logits [n, classes], labels [n].

    `logits`: mean over classes of logits^2 (LPViT, section 3.3: no labels needed). `empirical`: cross-entropy of the given
    labels. `sampled`: cross-entropy of labels drawn from the model, whose second moments are the true Fisher's.
    """
    if gradient == "logits":
        return logits.square().mean(dim=1).sum()
    if gradient == "sampled":
        labels = torch.multinomial(logits.detach().float().softmax(dim=1).cpu(), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, labels.to(logits.device), reduction="sum")


def collect(
    model: nn.Module,
    layers: dict[str, nn.Linear],
    batches: Iterable[tuple[Tensor, Tensor]],
    gradient: Gradient,
    seed: int,
    device: torch.device,
    on_batch: Callable[[int], None],
) -> dict[str, LayerStatistics]:
    """Statistics of `layers` over `batches` (images [n, 3, H, W], labels [n]). `on_batch` is told the images done.

    Raises UsageError when a layer is never called as a module, so that replacing it would change nothing, and CheckFailed when
    statistics are not finite.
    """
    model.eval().requires_grad_(False).to(device)
    statistics = {}
    for name, layer in layers.items():
        layer.weight.requires_grad_(True).grad = None
        rows, columns = layer.weight.shape
        statistics[name] = LayerStatistics(
            torch.zeros(columns, columns, device=device), torch.zeros(rows, device=device), torch.empty(0), tokens=0, images=0
        )
    handles = [layer.register_forward_hook(_observer(statistics[name])) for name, layer in layers.items()]
    generator = torch.Generator().manual_seed(seed)
    images = 0
    try:
        for x, labels in batches:
            loss_of(model(x.to(device)), labels, gradient, generator).backward()
            images += len(x)
            on_batch(images)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        if statistics[name].tokens == 0 or layer.weight.grad is None:
            raise UsageError(
                f"prune.layers: {name} is not called as a module in this architecture, so it cannot be made sparse",
                f"leave it out: --set 'prune.layers.exclude=[{name}]'",
            )
        statistics[name].gradient = layer.weight.grad
        statistics[name].images = images
        layer.weight.grad = None
        _require_finite(name, statistics[name])
    return statistics


def _require_finite(name: str, statistics: LayerStatistics) -> None:
    for field in FIELDS:
        if not bool(getattr(statistics, field).isfinite().all()):
            raise CheckFailed(
                f"calibration: {field} of {name} holds NaN or infinite values",
                "the model overflows on these images: check its weights and preprocessing (mean, std)",
            )


def _observer(statistics: LayerStatistics) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def observe(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2).float()  # [tokens, in]
        statistics.input_outer.addmm_(x.T, x)
        statistics.tokens += len(x)

        def add_output_gradient(d: Tensor) -> None:
            statistics.output_square.add_(d.float().flatten(0, -2).square().sum(dim=0))

        output.register_hook(add_output_gradient)

    return observe
