"""What is counted of outputs: against numpy, in several parts, with labels and without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from lpvit_cli.tasks.classification import Classification
from lpvit_cli.tasks.features import Features
from lpvit_cli.tasks.quality import ClassificationQuality, FeaturesQuality, Quality


def judged(task: Classification | Features, outputs: Tensor, reference: Tensor | None, labels: Tensor, parts: int = 3):  # type: ignore[no-untyped-def]
    score = task.score()
    for at in torch.arange(len(outputs)).chunk(parts):
        score.add(outputs[at], None if reference is None else reference[at], labels[at])
    return score.quality()


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(*shape, generator=generator)
    return reference + 0.5 * torch.randn(*shape, generator=generator), reference


def test_classification_with_labels_and_a_dense_model() -> None:
    outputs, reference = pair(50, 8)
    labels = torch.arange(50) % 8
    found = judged(Classification(), outputs, reference, labels)
    ranks = (-outputs.numpy()).argsort(axis=1)
    p, q = (np.exp(x.double().numpy()) / np.exp(x.double().numpy()).sum(axis=1, keepdims=True) for x in (reference, outputs))
    assert found.top1 == pytest.approx(100 * (ranks[:, 0] == labels.numpy()).mean())
    assert found.top5 == pytest.approx(100 * (ranks[:, :5] == labels.numpy()[:, None]).any(axis=1).mean())
    assert found.agreement == pytest.approx(100 * (ranks[:, 0] == reference.numpy().argmax(axis=1)).mean())
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-4)
    assert found.score == (found.top1, found.top5)
    assert found.accuracy is not None


def test_classification_without_labels_is_agreement() -> None:
    outputs, reference = pair(50, 8)
    found = judged(Classification(), outputs, reference, torch.full((50,), -1))
    assert (found.top1, found.top5, found.accuracy) == (None, None, None)
    assert found.score == (found.agreement, -found.kl)
    assert [figure.name for figure in found.figures] == ["same class as dense"]
    same = judged(Classification(), reference, reference, torch.full((50,), -1))
    assert same.agreement == 100
    assert same.kl == pytest.approx(0, abs=1e-6)


def test_labels_alone() -> None:
    outputs, _ = pair(50, 8)
    found = judged(Classification(), outputs, None, torch.arange(50) % 8)
    assert (found.agreement, found.kl) == (None, None)
    assert found.images == 50
    assert judged(Classification(), outputs[:0], None, torch.zeros(0, dtype=torch.long), 1).score == (0, 0)


@pytest.mark.parametrize("shape", [(40, 16), (40, 5, 16)])
def test_features(shape: tuple[int, ...]) -> None:
    """The cosine of an image is the mean over its tokens."""
    outputs, reference = pair(*shape)
    found = judged(Features(), outputs, reference, torch.full((40,), -1))
    a, b = outputs.double().numpy(), reference.double().numpy()
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    by_image = cosines.reshape(40, -1).mean(axis=1)
    assert found.cosine == pytest.approx(by_image.mean())
    assert found.cosine_p5 == pytest.approx(np.quantile(by_image, 0.05))
    assert found.relative_error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))
    assert found.score[0] == pytest.approx(100 * by_image.mean())
    assert (found.knn1, found.accuracy, found.images) == (None, None, 40)


@pytest.mark.parametrize(
    "quality",
    [
        ClassificationQuality(8, 50.0, 75.0, 90.0, 0.1),
        ClassificationQuality(8, agreement=90.0, kl=0.1),
        FeaturesQuality(8, 0.9, 0.8, 0.3),
        FeaturesQuality(8, knn1=50.0, knn5=60.0, knn20=70.0),
    ],
)
def test_what_reports_hold_is_read_back(quality: ClassificationQuality | FeaturesQuality) -> None:
    reader = TypeAdapter[ClassificationQuality | FeaturesQuality](Quality)
    assert reader.validate_json(reader.dump_json(quality)) == quality
