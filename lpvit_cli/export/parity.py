"""Does an exported file compute what the model computes?"""

from __future__ import annotations

from torch import Tensor


def relative_error(logits: Tensor, reference: Tensor) -> float:
    """||logits - reference|| / ||reference||."""
    return float((logits.double() - reference.double()).norm() / reference.double().norm())


def same_top1(logits: Tensor, reference: Tensor) -> float:
    """Fraction of images [n, classes] whose top-1 is the same class."""
    return float((logits.argmax(dim=1) == reference.argmax(dim=1)).double().mean())


def agreement(logits: Tensor, reference: Tensor, tolerance: float) -> float:
    """Fraction of images [n, classes] whose top-1 agrees; a tie within `tolerance` of the row's norm counts as agreeing."""
    chosen = reference.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    return float((reference.amax(dim=1) - chosen <= tolerance * reference.norm(dim=1)).double().mean())
