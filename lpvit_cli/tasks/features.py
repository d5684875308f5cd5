"""Features: a model without a head, judged by what its embeddings are worth to those who use them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lpvit_cli import distributed
from lpvit_cli.tasks.base import Batches, Loss, Score, Task, outputs_of
from lpvit_cli.tasks.quality import FeaturesQuality


class Features(Task):
    """Embeddings [n, features], or of all tokens [n, tokens, features]."""

    name = "features"
    needs_dense = True
    uses_labels = False
    uses_gradient = False

    def loss(self, gradient: str, seed: int) -> Loss:
        """<v, f> summed over images, v ~ N(0, I) for each: its second moments are the true Fisher of a Gaussian likelihood on
        the features. Needs no labels; `gradient` makes no difference."""
        generator = torch.Generator().manual_seed(seed)

        def loss(features: Tensor, labels: Tensor) -> Tensor:
            v = torch.randn(features.shape, generator=generator).to(features)
            return (features * v).sum()

        return loss

    def outputs(self, model: nn.Module, batches: Batches, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        return outputs_of(model, batches, device, dtype)

    def divergence(self, outputs: Tensor, reference: Tensor) -> float:
        """Squared error relative to the variance of the reference over images."""
        error = (outputs.double() - reference.double()).square().mean()
        return float(error / reference.double().var(dim=0, correction=0).mean().clamp_min(1e-300))

    def distillation(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """1 - cosine, plus half the squared error relative to the teacher's squared length, averaged over embeddings."""
        cosine = torch.cosine_similarity(outputs.float(), taught.float(), dim=-1)
        error = (outputs.float() - taught.float()).square().sum(dim=-1) / taught.float().square().sum(dim=-1).clamp_min(1e-12)
        return (1 - cosine + error / 2).mean()

    def score(self) -> Score:
        return Nearness()


class Nearness(Score):
    """Cosines of embeddings to the dense model's, by image: of tokens, their mean; and the squares of errors."""

    def __init__(self) -> None:
        self.images, self.cosines = 0, list[float]()
        self.squares = torch.zeros(2, dtype=torch.float64)  # of errors, of the reference

    def add(self, outputs: Tensor, reference: Tensor | None, labels: Tensor) -> None:
        self.images += len(outputs)
        if reference is None:
            return
        cosines = torch.cosine_similarity(outputs.double(), reference.double(), dim=-1)
        self.cosines += cosines.flatten(1).mean(dim=1).tolist() if cosines.ndim > 1 else cosines.tolist()
        errors = (outputs.double() - reference.double()).square().sum()
        self.squares += torch.stack([errors, reference.double().square().sum()])

    def quality(self) -> FeaturesQuality:
        distributed.all_reduce(self.squares)
        images = sum(distributed.all_gather([self.images]))
        cosines = torch.tensor(distributed.all_gather(self.cosines), dtype=torch.float64)
        if not len(cosines):
            return FeaturesQuality(images)
        error, length = self.squares.tolist()
        return FeaturesQuality(
            images=images,
            cosine=float(cosines.mean()),
            cosine_p5=float(cosines.quantile(0.05)),
            relative_error=(error / max(length, 1e-300)) ** 0.5,
        )
