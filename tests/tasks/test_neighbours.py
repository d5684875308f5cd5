"""k-NN against a vote counted one query at a time, and against scikit-learn where votes cannot be even."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from lpvit_cli.tasks.neighbours import KS, embedding_of, knn_top1


def clouds(count: int, classes: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(9))
    return centres[labels] + spread * torch.randn(count, 6, generator=generator), labels


def test_one_neighbour_as_scikit_learn_finds_it() -> None:
    (gallery, theirs), (queries, labels) = clouds(200, 5, 0.9, 0), clouds(120, 5, 0.9, 1)
    found = knn_top1(queries, labels, gallery, theirs)
    expected = KNeighborsClassifier(1, metric="cosine").fit(gallery.numpy(), theirs.numpy()).score(queries, labels)
    assert found[1] == pytest.approx(100 * expected)
    assert 20 < found[1] < 99, "too easy, or too hard, to tell anything"


def test_votes_are_counted_and_a_draw_goes_to_the_nearer() -> None:
    (gallery, theirs), (queries, labels) = clouds(90, 4, 1.1, 2), clouds(60, 4, 1.1, 3)
    unit = [x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (queries, gallery)]
    near = unit[0] @ unit[1].T
    for k, percent in knn_top1(queries, labels, gallery, theirs).items():
        hits = 0
        for row, label in zip(near, labels.tolist(), strict=True):
            voters = np.argsort(-row)[:k]
            votes = Counter(theirs[voters].tolist())
            nearness = {c: row[[v for v in voters if theirs[v] == c]].sum() for c in votes}
            hits += max(votes, key=lambda c: (votes[c], nearness[c])) == label
        assert percent == pytest.approx(100 * hits / len(labels))
    assert KS == (1, 5, 20)


def test_length_means_nothing_and_a_small_gallery_votes_as_a_whole() -> None:
    gallery, theirs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 1, 1])
    found = knn_top1(torch.tensor([[500.0, 1.0]]), torch.tensor([0]), gallery, theirs)
    assert found == {1: 100.0, 5: 0.0, 20: 0.0}


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (3, 2, 4, 8)])
def test_an_embedding_is_the_mean_over_tokens(shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape)
    assert torch.allclose(embedding_of(outputs), outputs.reshape(3, -1, 8).mean(dim=1), atol=1e-6)
