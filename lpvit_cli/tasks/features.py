"""Features: a model without a head, judged by what its embeddings are worth to those who use them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lpvit_cli.tasks.base import Batches, Loss, Task, outputs_of


class Features(Task):
    """Embeddings [n, features], or of all tokens [n, tokens, features]."""

    def loss(self, gradient: str, seed: int) -> Loss:
        """<v, f> summed over images, v ~ N(0, I) for each: its second moments are the true Fisher of a Gaussian likelihood on
        the features. Needs no labels; `gradient` makes no difference."""
        generator = torch.Generator().manual_seed(seed)

        def loss(features: Tensor, labels: Tensor) -> Tensor:
            v = torch.randn(features.shape, generator=generator).to(features)
            return (features * v).sum()

        return loss

    def outputs(self, model: nn.Module, batches: Batches, device: torch.device) -> Tensor:
        return outputs_of(model, batches, device)

    def divergence(self, outputs: Tensor, reference: Tensor) -> float:
        """Squared error relative to the variance of the reference over images."""
        error = (outputs.double() - reference.double()).square().mean()
        return float(error / reference.double().var(dim=0, correction=0).mean().clamp_min(1e-300))

    def distillation(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """1 - cosine, plus half the squared error relative to the teacher's squared length, averaged over embeddings."""
        cosine = torch.cosine_similarity(outputs.float(), taught.float(), dim=-1)
        error = (outputs.float() - taught.float()).square().sum(dim=-1) / taught.float().square().sum(dim=-1).clamp_min(1e-12)
        return (1 - cosine + error / 2).mean()
