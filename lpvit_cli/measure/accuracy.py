"""Top-1 and top-5 accuracy of anything that turns images into logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lpvit_cli import distributed


@dataclass(frozen=True)
class Accuracy:
    """Percentages over `images` images; 0 images give 0 %."""

    top1: float
    top5: float
    images: int


def accuracy(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    on_batch: Callable[[int], None] | None = None,
) -> Accuracy:
    """`logits_of` maps images [n, 3, H, W] to logits [n, classes]; `on_batch` is told how many images are done.

    With several processes, each with batches of its own, that of all images together.
    """
    images = top1 = top5 = 0
    for x, labels in batches:
        logits = logits_of(x).float().cpu()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        images += len(labels)
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
        if on_batch:
            on_batch(images)
    counts = torch.tensor([images, top1, top5])
    distributed.sum_(counts)
    images, top1, top5 = counts.tolist()
    return Accuracy(100 * top1 / max(1, images), 100 * top5 / max(1, images), images)
