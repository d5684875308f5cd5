"""Models sorted by saliency: scores written out weight by weight, and statistics that are those of the model that was moved."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from helpers import MODELS, random_model, random_statistics, relative
from torch import Tensor, nn

from lpvit_cli.curvature import LayerStatistics, collect
from lpvit_cli.models.axes import axes
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.ordered import ordered_modules
from lpvit_cli.pruning.block_obs import damped
from lpvit_cli.pruning.reorder import feature_scores, reordered, saliency
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.tasks.classification import calibration_loss

CPU = torch.device("cpu")


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 32, 32, generator=generator), torch.randint(5, (6,), generator=generator)


def statistics_of(model: nn.Module, layers: dict[str, nn.Linear]) -> dict[str, LayerStatistics]:
    found = collect(model, layers, [images()], calibration_loss("empirical", 0), CPU, lambda done: None)
    model.eval()
    return found


@pytest.mark.parametrize("which", MODELS)
def test_moved_statistics_are_those_of_the_moved_model(which: str) -> None:
    model: Any = random_model(which)
    layers = prunable_layers(model, Layers())
    statistics = statistics_of(model, layers)
    found = reordered(model, layers, statistics, images()[0])
    assert len(found.notes) == ("normalised" in which)
    moved = prunable_layers(found.model, Layers())
    fresh = statistics_of(found.model, moved)
    assert found.statistics.keys() == fresh.keys() == layers.keys()
    for name, one in found.statistics.items():
        assert not torch.equal(moved[name].weight, layers[name].weight)
        for field in ("A", "G", "gradient", "weighted"):
            expected, given = getattr(fresh[name], field), getattr(one, field)
            assert relative(given, expected) < 1e-4
            assert relative(getattr(statistics[name], field), expected) > 0.1, "statistics in the old order would do too"
        assert (one.tokens, one.images) == (fresh[name].tokens, fresh[name].images)
    assert ordered_modules(found.model) == ["norm"]
    assert ordered_modules(model) == []


def test_saliency_is_the_cost_of_a_weight_alone() -> None:
    """min over the other weights of the row of 1/2 d H d^T with d_c = -w_c, and S_rr: half of it."""
    weight, statistics = torch.randn(5, 7, generator=torch.Generator().manual_seed(3)), random_statistics(5, 7)
    hessian, s = damped(statistics.token_hessian).double(), statistics.loss_weights
    for r, c in ((0, 0), (3, 5)):
        others = [k for k in range(7) if k != c]
        rest = torch.linalg.solve(hessian[others][:, others], hessian[others, c])
        cost = s[r, r] * weight[r, c] ** 2 * (hessian[c, c] - hessian[c, others] @ rest)
        assert relative(saliency(weight, statistics)[r, c], cost) < 1e-4


def test_scores_sum_over_all_weights_of_a_feature() -> None:
    model = random_model("vit")
    elements = {name: torch.rand_like(layer.weight) for name, layer in prunable_layers(model, Layers()).items()}
    by_name = {axis.name: feature_scores(axis, elements) for axis in axes(model)}
    for block in range(2):
        qkv, proj, fc1, fc2 = (elements[f"blocks.{block}.{name}"] for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
        assert relative(by_name[f"blocks.{block}.mlp.neurons"], fc1.sum(1) + fc2.sum(0)) < 1e-6
        assert relative(by_name[f"blocks.{block}.attn.values"], qkv[64:].sum(1) + proj.sum(0)) < 1e-6
        assert relative(by_name[f"blocks.{block}.attn.queries"], qkv[:32].sum(1) + qkv[32:64].sum(1)) < 1e-6
    reads = sum(e.sum(0) for name, e in elements.items() if name.endswith(("qkv", "fc1")))
    writes = sum(e.sum(1) for name, e in elements.items() if name.endswith(("proj", "fc2")))
    assert relative(by_name["residual.0"], reads + writes) < 1e-6


def test_the_costly_come_first_and_axes_without_a_layer_stay() -> None:
    model: Any = random_model("vit")
    layers = prunable_layers(model, Layers(include=("blocks.0.mlp.*",)))
    statistics = statistics_of(model, layers)
    found = reordered(model, layers, statistics, images()[0])
    moved = prunable_layers(found.model, Layers(include=("blocks.0.mlp.*",)))
    elements = {name: saliency(layer.weight.detach(), found.statistics[name]) for name, layer in moved.items()}
    sorted_axes = {axis.name: scores for axis in axes(found.model) if (scores := feature_scores(axis, elements)) is not None}
    assert sorted_axes.keys() == {"blocks.0.mlp.neurons", "residual.0"}
    for scores in sorted_axes.values():
        assert bool((scores.diff() <= 1e-3 * scores[:-1]).all())
    assert torch.equal(found.model.blocks[1].mlp.fc1.bias, model.blocks[1].mlp.fc1.bias)


def test_a_model_without_axes_is_a_copy() -> None:
    model: Any = timm.create_model("resnet10t", num_classes=5).eval()
    layers = {"fc": model.fc}
    found = reordered(model, layers, {"fc": random_statistics(5, 512)}, images()[0])
    assert found.model is not model
    assert found.notes == []
    assert torch.equal(found.model.fc.weight, model.fc.weight)
