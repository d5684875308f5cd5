"""The loss whose curvature is taken, and how far a pruned model is from its parent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Gradient = Literal["logits", "empirical", "sampled"]
Loss = Callable[[Tensor, Tensor], Tensor]  # logits [n, classes], labels [n] -> sum over the n images


def calibration_loss(gradient: Gradient, seed: int) -> Loss:
    """`logits`: mean over classes of logits^2 (LPViT, section 3.3: no labels needed). `empirical`: cross-entropy of the given
    labels. `sampled`: cross-entropy of labels drawn from the model, whose second moments are the true Fisher's.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if gradient == "logits":
            return logits.square().mean(dim=1).sum()
        if gradient == "sampled":
            labels = torch.multinomial(logits.detach().float().softmax(dim=1).cpu(), 1, generator=generator)[:, 0]
        return F.cross_entropy(logits, labels.to(logits.device), reduction="sum")

    return loss


Batches = Iterable[tuple[Tensor, Tensor]]  # images [n, 3, H, W], labels [n]


def class_probabilities(model: nn.Module, batches: Batches, device: torch.device) -> Tensor:
    """Softmax outputs [images, classes], on the CPU."""
    model.eval().to(device)  # before inference mode, whose tensors no backward pass could use
    with torch.inference_mode():
        return torch.cat([model(images.to(device)).float().softmax(dim=1).cpu() for images, _ in batches])


def divergence(model: nn.Module, target: Tensor, batches: Batches, device: torch.device) -> float:
    """Mean Kullback-Leibler divergence, in nats, of the model's class probabilities from `target` [images, classes]."""
    found = class_probabilities(model, batches, device).clamp_min(torch.finfo(torch.float32).tiny)
    return float(F.kl_div(found.log(), target, reduction="batchmean"))
