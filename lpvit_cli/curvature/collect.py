"""One pass over calibration images: hooks on the prunable layers sum what LayerStatistics holds.

Per-image losses are summed over the batch, so every gradient is that of single images; the weight gradient is summed by
autograd into `weight.grad`. Memory beyond the model: one [in, in] and one [out, in] per layer and the activations of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor, nn

from lpvit_cli.curvature.inputs import observe_inputs
from lpvit_cli.curvature.outputs import observe_outputs, on_diagonal
from lpvit_cli.curvature.statistics import LayerStatistics
from lpvit_cli.devices import autocast
from lpvit_cli.errors import CheckFailed, UsageError
from lpvit_cli.models.layers import called_layers, require_called
from lpvit_cli.tasks.base import Loss


def collect(
    model: nn.Module,
    layers: dict[str, nn.Linear],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    device: torch.device,
    on_batch: Callable[[int], None],
    dtype: torch.dtype = torch.float32,
    height: int | None = None,
) -> dict[str, LayerStatistics]:
    """Statistics of `layers` over `batches` (images [n, C, H, W], labels [n]) under `loss`. `on_batch` is told the images done;
    `dtype`: in which the model computes (autocast). `height`: G is zero but for the blocks of so many outputs on its diagonal,
    which cost less; None: all of it.

    With several processes, each with batches of its own, those of all images together.

    Raises UsageError, before the pass, when layers are never called as modules, so that replacing them would change nothing,
    and CheckFailed when statistics are not finite.
    """
    model.eval().requires_grad_(False).to(device)
    batches = _checked(model, layers, batches, device)
    statistics, squares, handles = {}, {}, []
    for name, layer in layers.items():
        layer.weight.requires_grad_(True).grad = None
        rows, columns = layer.weight.shape
        a, weighted = (torch.zeros(columns, columns, device=device) for _ in range(2))
        at_once = height or rows
        squares[name] = torch.zeros(-(-rows // at_once), at_once, at_once, device=device)
        sums = LayerStatistics(a, torch.empty(0), torch.empty(0), weighted, 0, 0)
        handles += [observe_inputs(layer, sums), observe_outputs(layer, squares[name], partial(_weigh, weighted))]
        statistics[name] = sums
    images = 0
    try:
        for x, labels in batches:
            with autocast(device, dtype):
                outputs = model(x.to(device, non_blocking=True))
            loss(outputs.float(), labels).backward()
            images += len(x)
            on_batch(images)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        unseen = layer.weight.grad is None
        statistics[name].gradient = torch.zeros_like(layer.weight) if layer.weight.grad is None else layer.weight.grad
        statistics[name].G = on_diagonal(squares.pop(name), layer.out_features)
        statistics[name].images = images
        statistics[name].sum_over_processes()
        if images and unseen:
            raise UsageError(
                f"prune.layers: {name} changes nothing that the model gives, so it cannot be pruned",
                f"leave it out: --set 'prune.layers.exclude=[{name}]'",
            )
        layer.weight.grad = None
        _require_finite(name, statistics[name])
    return statistics


def _weigh(into: Tensor, x: Tensor, weights: Tensor) -> None:
    into.addmm_((x.float() * weights[:, None]).T, x.float())


def _checked(
    model: nn.Module, layers: Iterable[str], batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches, after one image of theirs has gone through every layer."""
    rest = iter(batches)
    first = list(islice(rest, 1))
    for x, _ in first:
        require_called(list(layers), called_layers(model, x[:1].to(device)))
    return chain(first, rest)


def _require_finite(name: str, statistics: LayerStatistics) -> None:
    if field := statistics.not_finite:
        raise CheckFailed(
            f"calibration: {field} of {name} holds NaN or infinite values",
            "the model overflows on these images: check its weights and preprocessing (mean, std)",
        )
