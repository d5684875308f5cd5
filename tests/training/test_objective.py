"""The loss of recovery against its formulas written out, and what a teacher is shown."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import relative
from timm.data import Mixup
from torch import Tensor, nn

from lpvit_cli.recipe.finetune import Augment, Distill, FinetuneSection
from lpvit_cli.recovery.objective import Objective, Teacher, distillation, first_nonfinite, mixed


class Fixed(nn.Module):
    """Gives the same logits whatever it sees, and remembers what it saw."""

    num_classes = 3

    def __init__(self, logits: Tensor, size: int = 8, mean: float = 0.5, std: float = 0.5):
        super().__init__()
        self.logits = logits
        self.pretrained_cfg = {"input_size": (3, size, size), "mean": (mean,) * 3, "std": (std,) * 3}
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.logits


LOGITS, SAID = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]), torch.tensor([[0.0, 1.0, 2.0], [2.0, -1.0, 0.0]])
LABELS = torch.tensor([1, 0])


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def cross_entropy() -> float:
    return -sum(math.log(softmax(row)[label]) for row, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True)) / 2


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 2.0), (0.9, 1.0), (0.0, 4.0)])
def test_soft_distillation_is_its_formula(weight: float, temperature: float) -> None:
    divergence = 0.0
    for student, teacher in zip(LOGITS.tolist(), SAID.tolist(), strict=True):
        p, q = softmax(teacher, temperature), softmax(student, temperature)
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 2
    settings = FinetuneSection(distill={"weight": weight, "temperature": temperature})
    loss, logits = Objective(settings, 3, lambda x: SAID)(lambda x: LOGITS, torch.zeros(2, 3, 8, 8), LABELS)
    expected = (1 - weight) * cross_entropy() + weight * temperature**2 * divergence
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(logits, LOGITS)


def test_hard_distillation_takes_the_class_the_teacher_decides_for() -> None:
    expected = -(math.log(softmax(LOGITS[0].tolist())[2]) + math.log(softmax(LOGITS[1].tolist())[0])) / 2
    assert float(distillation(LOGITS, SAID, Distill(kind="hard"))) == pytest.approx(expected, rel=1e-6)


def test_without_a_teacher_it_is_smoothed_cross_entropy() -> None:
    smoothed = Objective(FinetuneSection(distill=None, label_smoothing=0.1), 3, None)
    uniform = -sum(math.log(p) for row in LOGITS.tolist() for p in softmax(row)) / 6
    loss, _ = smoothed(lambda x: LOGITS, torch.zeros(2, 3, 8, 8), LABELS)
    assert float(loss) == pytest.approx(0.9 * cross_entropy() + 0.1 * uniform, rel=1e-6)


@pytest.mark.parametrize("count", [6, 5, 1])
def test_mixup_mixes_images_as_it_mixes_labels(count: int) -> None:
    """An image of class c is c everywhere: after mixing, its value is the mean of its target. The odd one stays."""
    labels = torch.arange(count) % 4
    images = labels[:, None, None, None].expand(count, 3, 8, 8).float()
    before = images.clone()
    torch.manual_seed(0)
    x, targets = mixed(Mixup(1.0, 0.0, label_smoothing=0.0, num_classes=4), images, labels, 4)
    assert torch.equal(images, before), "the loader's images are left alone"
    assert relative(targets.sum(dim=1), torch.ones(count)) < 1e-6
    assert relative(x.mean(dim=(1, 2, 3)), targets @ torch.arange(4.0)) < 1e-5 or count == 1
    assert count % 2 == 0 or torch.equal(x[-1], before[-1])
    assert count == 1 or not torch.equal(x, before)


def test_the_objective_mixes_where_the_recipe_says_so_and_not_for_the_start() -> None:
    settings = FinetuneSection(distill=None, augment=Augment(cutmix=1.0))
    model, images = Fixed(torch.zeros(4, 3)), torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).contiguous()
    objective = Objective(settings, 3, None)
    objective(model, images, torch.tensor([0, 1, 2, 0]), mix=False)
    assert torch.equal(model.seen, images)
    objective(model, images, torch.tensor([0, 1, 2, 0]))
    assert not torch.equal(model.seen, images)


def test_a_teacher_sees_the_pixels_normalised_and_scaled_as_it_wants_them() -> None:
    pixels = nn.functional.avg_pool2d(torch.rand(2, 3, 12, 12), 5, stride=1)  # smooth: scaling up and down gives it back
    student, teacher = Fixed(LOGITS), Fixed(SAID, size=16, mean=0.3, std=0.2)
    assert torch.equal(Teacher(teacher, student)((pixels - 0.5) / 0.5), SAID)
    assert teacher.seen.shape == (2, 3, 16, 16)
    coarse = nn.functional.avg_pool2d(teacher.seen, 2)
    assert relative(coarse, (pixels - 0.3) / 0.2) < 0.05, "the picture it was scaled from"
    twin = Fixed(SAID)
    images = torch.randn(2, 3, 8, 8)
    Teacher(twin, student)(images)
    assert twin.seen is images


def test_the_first_layer_that_overflows_is_named(tiny_vit: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    assert first_nonfinite(tiny_vit, x) is None
    tiny_vit.blocks[1].mlp.fc1.bias.data[0] = float("inf")
    assert first_nonfinite(tiny_vit, x) == "blocks.1.mlp.fc1"
