"""Gradients of single images against autograd on each image alone, whatever the memory they are given."""

from __future__ import annotations

import pytest
import torch
from helpers import relative
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli.curvature import ImageGradients, single_images
from lpvit_cli.errors import UsageError
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.tasks.classification import calibration_loss

CPU = torch.device("cpu")
HEIGHT = 20  # divides no layer


def image_gradients(model: nn.Module, gradient: str = "empirical", count: int = 5, seed: int = 0) -> ImageGradients:
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(6, 3, 32, 32, generator=generator), torch.randint(5, (6,), generator=generator)
    batches = [(x[:4], labels[:4]), (x[4:], labels[4:])]
    layers = prunable_layers(model, Layers())
    return ImageGradients(model, layers, single_images(batches, count), lambda: calibration_loss(gradient, seed), CPU)  # type: ignore[arg-type]


def whole(gradients: ImageGradients, memory_bytes: int, height: int = HEIGHT) -> dict[str, Tensor]:
    """G [m, out, in] of every layer, put together from its pieces; no row twice, and none left out."""
    parts: dict[str, list[Tensor]] = {name: [] for name in gradients.layers}
    at = dict.fromkeys(gradients.layers, 0)
    for name, rows, g in gradients.stream(dict.fromkeys(gradients.layers, height), memory_bytes):
        assert rows.start == at[name]
        assert g.shape[1] == rows.stop - rows.start == min(height, gradients.layers[name].out_features - rows.start)
        at[name] = rows.stop
        parts[name].append(g.clone())
    assert at == {name: layer.out_features for name, layer in gradients.layers.items()}
    return {name: torch.cat(g, dim=1) for name, g in parts.items()}


@pytest.mark.parametrize("gradient", ["logits", "empirical"])
def test_gradients_are_those_of_each_image_alone(tiny_vit: nn.Module, gradient: str) -> None:
    gradients = image_gradients(tiny_vit, gradient)
    found = whole(gradients, 2**30)
    model = tiny_vit.double().requires_grad_(True)
    for i, (image, label) in enumerate(gradients.images):
        logits = model(image.double())
        loss = logits.square().mean() if gradient == "logits" else F.cross_entropy(logits, label)
        expected = torch.autograd.grad(loss, [model.get_submodule(name).weight for name in found])
        for g, e in zip(found.values(), expected, strict=True):
            assert relative(g[i], e) < 2e-5


@pytest.mark.parametrize("gradient", ["empirical", "sampled"])
@pytest.mark.parametrize("rows_at_once", [1, 3, 7])
def test_gradients_do_not_depend_on_the_memory(tiny_vit: nn.Module, gradient: str, rows_at_once: int) -> None:
    """Labels that are drawn are the same in every pass."""
    gradients = image_gradients(tiny_vit, gradient)
    expected = whole(gradients, 2**30)
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    tiny_vit.register_forward_hook(count)
    budget = rows_at_once * 4 * 5 * HEIGHT * 128  # pieces of the widest layer, fc2
    found = whole(gradients, budget)
    total = sum(g.numel() for g in expected.values()) * 4
    assert passes % 5 == 0
    assert total / budget <= passes // 5 <= 2 * total / budget + 1, "a pass takes as much as fits"
    for name, g in found.items():
        assert relative(g, expected[name]) < 1e-6


def test_the_gradients_of_a_pass_stay_within_the_memory(tiny_vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    made, empty = [], torch.empty

    def recorded(*size: int, **options: object) -> Tensor:
        tensor = empty(*size, **options)  # type: ignore[call-overload]
        made.append(tensor.numel() * tensor.element_size())
        return tensor  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "empty", recorded)
    budget = 100_000
    pieces = {g.untyped_storage().data_ptr() for _, _, g in image_gradients(tiny_vit).stream({"blocks.1.mlp.fc2": 8}, budget)}
    assert len(pieces) == 1, "all passes share one buffer"
    assert 0 < max(made) <= budget


def test_other_seeds_draw_other_labels(tiny_vit: nn.Module) -> None:
    first, other = (whole(image_gradients(tiny_vit, "sampled", seed=seed), 2**30)["blocks.0.mlp.fc1"] for seed in (0, 1))
    assert relative(first, other) > 0.1


def test_the_mean_square_is_over_images_and_all_weights(tiny_vit: nn.Module) -> None:
    gradients = image_gradients(tiny_vit)
    values = torch.cat([g.flatten() for g in whole(gradients, 2**30).values()]).double()
    assert gradients.mean_square == pytest.approx(float(values.square().mean()), rel=1e-6)


def test_nothing_is_left_in_the_model(tiny_vit: nn.Module) -> None:
    tiny_vit.train().requires_grad_(False)
    whole(image_gradients(tiny_vit), 2**30)
    assert not tiny_vit.training, "dropout must not draw"
    assert all(parameter.grad is None for parameter in tiny_vit.parameters())


def test_rows_that_do_not_fit_are_refused(tiny_vit: nn.Module) -> None:
    gradients = image_gradients(tiny_vit)
    fits = 4 * 5 * HEIGHT * 128
    whole(gradients, fits)
    with pytest.raises(UsageError, match=r"prune.fisher_images: 5 gradients of 20 rows of blocks.0.mlp.fc2 take 0.0 GB"):
        whole(gradients, fits - 1)


@pytest.mark.parametrize(("count", "found"), [(1, 1), (4, 4), (5, 5), (6, 6), (9, 6)])
def test_the_first_images(tiny_vit: nn.Module, count: int, found: int) -> None:
    images = image_gradients(tiny_vit, count=count).images
    six = image_gradients(tiny_vit, count=6).images
    assert len(images) == found
    for (image, label), (x, y) in zip(images, six, strict=False):
        assert image.shape == (1, 3, 32, 32)
        assert label.shape == (1,)
        assert torch.equal(image, x)
        assert torch.equal(label, y)
