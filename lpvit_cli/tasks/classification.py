"""Classification: logits, their classes, and the accuracy of anything that turns images into logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli import distributed
from lpvit_cli.tasks.base import Batches, Loss, Task, outputs_of


@dataclass(frozen=True)
class Accuracy:
    """Percentages over `images` images; 0 images give 0 %."""

    top1: float
    top5: float
    images: int

    @property
    def score(self) -> tuple[float, float]:
        return self.top1, self.top5


class Classification(Task):
    """Logits [n, classes]."""

    def loss(self, gradient: str, seed: int) -> Loss:
        return calibration_loss(gradient, seed)

    def outputs(self, model: nn.Module, batches: Batches, device: torch.device) -> Tensor:
        return class_probabilities(model, batches, device)

    def divergence(self, outputs: Tensor, reference: Tensor) -> float:
        """Mean Kullback-Leibler divergence, in nats, of class probabilities [images, classes] from the reference's."""
        return float(F.kl_div(outputs.clamp_min(torch.finfo(torch.float32).tiny).log(), reference, reduction="batchmean"))

    def distillation(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """T^2 KL(teacher || student) of logits, both at temperature T = 2."""
        return soft_distillation(outputs, taught, temperature=2.0)


def calibration_loss(gradient: str, seed: int) -> Loss:
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


def class_probabilities(model: nn.Module, batches: Batches, device: torch.device) -> Tensor:
    """Softmax outputs [images, classes], on the CPU."""
    return outputs_of(model, batches, device).softmax(dim=1)


def soft_distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), both [n, classes] at temperature T, averaged over n (arXiv 1503.02531)."""
    target = F.log_softmax(taught.float() / temperature, dim=1)
    student = F.log_softmax(logits.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, target, log_target=True, reduction="batchmean")


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
    distributed.all_reduce(counts)
    images, top1, top5 = counts.tolist()
    return Accuracy(100 * top1 / max(1, images), 100 * top5 / max(1, images), images)
