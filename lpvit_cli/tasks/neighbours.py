"""k-NN classification by cosine: what embeddings are worth to those who search in them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

KS = (1, 5, 20)
QUERIES = 512  # at a time


def knn_top1(queries: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> dict[int, float]:
    """Percent of `queries` [n, d] with labels [n] that get their class by the vote of the k nearest in `gallery` [m, d] with
    labels [m], for each k of KS; a draw goes to the classes whose votes are nearer. A gallery smaller than k votes as a whole.
    """
    gallery, classes = F.normalize(gallery.float(), dim=1), int(gallery_labels.max()) + 1
    hits = dict.fromkeys(KS, 0)
    for some, truth in zip(F.normalize(queries.float(), dim=1).split(QUERIES), labels.split(QUERIES), strict=True):
        near = (some @ gallery.T).topk(min(max(KS), len(gallery)), dim=1)
        for k in KS:
            among_even = near.values[:, :k] / (2 * k + 1)  # adds up to less than half a vote
            total = torch.zeros(len(some), classes).scatter_add_(1, gallery_labels[near.indices[:, :k]], 1 + among_even)
            hits[k] += int((total.argmax(dim=1) == truth).sum())
    return {k: 100 * count / max(1, len(queries)) for k, count in hits.items()}


def embedding_of(outputs: Tensor) -> Tensor:
    """[n, d] of pooled embeddings, or the mean over tokens [n, tokens, d] and places [n, H, W, d]."""
    return outputs if outputs.ndim == 2 else torch.flatten(outputs, 1, -2).mean(dim=1)
