"""Classification: logits, their classes, and how well a model tells classes apart, with labels or without."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli import distributed
from lpvit_cli.tasks.base import Batches, Loss, Score, Task, outputs_of
from lpvit_cli.tasks.quality import ClassificationQuality


class Classification(Task):
    """Logits [n, classes]."""

    name = "classification"

    def loss(self, gradient: str, seed: int) -> Loss:
        return calibration_loss(gradient, seed)

    def outputs(self, model: nn.Module, batches: Batches, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        return class_probabilities(model, batches, device, dtype)

    def divergence(self, outputs: Tensor, reference: Tensor) -> float:
        """Mean Kullback-Leibler divergence, in nats, of class probabilities [images, classes] from the reference's."""
        return float(_divergence(outputs, reference) / max(1, len(outputs)))

    def distillation(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """T^2 KL(teacher || student) of logits, both at temperature T = 2."""
        return soft_distillation(outputs, taught, temperature=2.0)

    def score(self) -> Score:
        return ClassScore()


class ClassScore(Score):
    """Counts of images: with labels, with the right class first or among the first five, with the dense model's class."""

    def __init__(self) -> None:
        self.counts = torch.zeros(6, dtype=torch.float64)  # images, labelled, top-1, top-5, compared, agreeing
        self.kl = torch.zeros(1, dtype=torch.float64)

    def add(self, outputs: Tensor, reference: Tensor | None, labels: Tensor) -> None:
        best = outputs.topk(min(5, outputs.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        compared = agreeing = 0
        if reference is not None:
            compared, agreeing = len(outputs), int((best[:, 0] == reference.argmax(dim=1)).sum())
            self.kl += _divergence(outputs.softmax(dim=1), reference.softmax(dim=1)).double()
        labelled = int((labels >= 0).sum())
        self.counts += torch.tensor([len(outputs), labelled, int(hits[:, 0].sum()), int(hits.sum()), compared, agreeing])

    def quality(self) -> ClassificationQuality:
        distributed.all_reduce(self.counts, self.kl)
        images, labelled, top1, top5, compared, agreeing = (int(count) for count in self.counts)
        has_labels = labelled or not compared  # no images at all: 0 %
        return ClassificationQuality(
            images=images,
            top1=100 * top1 / max(1, labelled) if has_labels else None,
            top5=100 * top5 / max(1, labelled) if has_labels else None,
            agreement=100 * agreeing / compared if compared else None,
            kl=float(self.kl) / compared if compared else None,
        )


def _divergence(probabilities: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || probabilities) in nats, both [n, classes], summed over n."""
    tiny = torch.finfo(torch.float32).tiny
    return F.kl_div(probabilities.clamp_min(tiny).log(), reference, reduction="sum")


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


def class_probabilities(model: nn.Module, batches: Batches, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Softmax outputs [images, classes], on the CPU."""
    return outputs_of(model, batches, device, dtype).softmax(dim=1)


def soft_distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), both [n, classes] at temperature T, averaged over n (arXiv 1503.02531)."""
    target = F.log_softmax(taught.float() / temperature, dim=1)
    student = F.log_softmax(logits.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, target, log_target=True, reduction="batchmean")
