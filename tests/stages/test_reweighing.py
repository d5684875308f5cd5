"""Layers weighed anew: errors against removal from scratch, gradients against autograd, the nearest weighing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import random_statistics, relative
from stages.plans import batches, plan_of, quiet
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli.pruning.block_obs import removal_order
from lpvit_cli.pruning.cost import layer_cost
from lpvit_cli.pruning.engine import prune_model
from lpvit_cli.pruning.groups import Option
from lpvit_cli.pruning.plan import Plan
from lpvit_cli.pruning.removal import Removal
from lpvit_cli.recipe.prune import Budget, Power
from lpvit_cli.sparse import densify
from lpvit_cli.tasks.classification import Classification

# one layer


def option_of(weight: Tensor, hessian: Tensor, output_weights: Tensor, block: tuple[int, int], balanced: bool) -> Option:
    greedy = removal_order(weight, hessian, block, output_weights)
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    return Option(block, Removal.greedy(*greedy, balanced), layer_cost(layer, 3, block, Power()))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("shape", "block"), [((12, 16), (4, 4)), ((10, 15), (4, 6)), ((12, 16), (12, 4))], ids=str)
def test_weights_that_grow_by_a_factor_in_every_block_row_make_a_new_order(
    shape: tuple[int, int], block: tuple[int, int], balanced: bool
) -> None:
    """Then scaling the errors of the rows is exact: the same as removing anew with the new weights."""
    statistics = random_statistics(*shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    old = statistics.loss_weights
    factors = torch.tensor([9.0, 0.2, 3.0]).repeat_interleave(block[0])[: shape[0]]
    new = factors.sqrt()[:, None] * old * factors.sqrt()
    got = option_of(weight, statistics.hessian / 2, old, block, balanced).reweighed(old, new, balanced)
    expected = option_of(weight, statistics.hessian / 2, new, block, balanced)
    assert torch.equal(got.removal.order, expected.removal.order)
    assert relative(got.removal.distortion, expected.removal.distortion) < 1e-5
    assert got.removal.unit == expected.removal.unit
    before = option_of(weight, statistics.hessian / 2, old, block, balanced).removal
    assert relative(before.distortion, expected.removal.distortion) > 0.1


def test_in_general_the_ratio_of_the_mean_weights_counts() -> None:
    old, new = (torch.diag(torch.tensor(weights)) for weights in ([1.0, 3.0, 2.0, 2.0], [8.0, 0.0, 1.0, 5.0]))
    order, errors = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1.0, 10.0], [4.0, 5.0]]).double()
    option = Option((2, 3), Removal.greedy(order, errors), layer_cost(nn.Linear(6, 4), 1, (2, 3), Power()))
    got = option.reweighed(old + 0.7 - 0.7 * torch.eye(4), new, False)  # products of errors are no part of the ratio
    assert got.removal.distortion.tolist() == [0, 2, 8, 15.5, 35.5]
    assert got.removal.order.tolist() == [0, 3, 2, 1]


def test_outputs_without_a_gradient_weigh_nothing_before_and_after() -> None:
    """A block row of no weight, such as one behind a dead ReLU, stays free and does not become NaN."""
    statistics = random_statistics(8, 12)
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    old = statistics.loss_weights.clone()
    old[:4] = old[:, :4] = 0
    option = option_of(weight, statistics.hessian / 2, old, (4, 4), False)
    got = option.reweighed(old, statistics.loss_weights, False).removal
    assert got.distortion.isfinite().all()
    assert got.distortion[:4].tolist() == [0] * 4
    assert got.order[:3].sort().values.tolist() == [0, 1, 2]


# a plan


class Watched:
    """Divergences as told, and the models they were asked of, the dense one left out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
        self.values, self.models, self.images = list(values), [], []
        dense: list[nn.Module] = []

        def outputs(task: Classification, model: nn.Module, images: object, device: object, dtype: object) -> Tensor:
            self.images.append(images)
            if dense:
                self.models.append(copy.deepcopy(model))
            dense.append(model)
            return torch.zeros(1)

        monkeypatch.setattr(Classification, "outputs", outputs)
        monkeypatch.setattr(Classification, "divergence", lambda *_: self.values[len(self.models) - 1])


def same_weights(a: nn.Module, b: nn.Module, plan: Plan) -> bool:
    a, b = densify(a), densify(b)  # type: ignore[assignment]
    return all(torch.equal(a.get_submodule(name).weight, b.get_submodule(name).weight) for name in plan.layers)  # type: ignore[arg-type]


WEIGHINGS = [
    "gradients of the dense model",
    "relative errors of their outputs",
    "gradients of the dense and the pruned model (round 1)",
    "gradients of the dense and the pruned model (round 2)",
]


@pytest.mark.parametrize(
    ("divergences", "best"),
    [
        ([1, 2, 3, 4], 0),
        ([3, 1, 2, 4], 1),
        ([4, 3, 1, 2], 2),
        ([4, 3, 2, 1], 3),
        ([2, 2, 2, 2], 0),
        ([math.nan, 4, 3, 2], 3),
        ([1, math.nan, 2, 3], 0),
    ],
    ids=str,
)
def test_the_weighing_nearest_to_the_dense_model_is_taken_and_told(
    monkeypatch: pytest.MonkeyPatch, divergences: list[float], best: int
) -> None:
    watched = Watched(monkeypatch, *divergences)
    plan = plan_of("vit", "prune.reweigh=2", "prune.sequential=false", "prune.block=[8,4]")
    model, pruned = prune_model(plan, Budget(sparsity=0.8), quiet)
    assert len(watched.models) == 4, "the last round is judged too"
    assert [same_weights(model, one, plan) for one in watched.models] == [n == best for n in range(4)]
    for name, mask in pruned.masks.items():
        weight = watched.models[best].get_submodule(name).weight
        assert int((weight != 0).sum()) == int(mask.sum()) * 8 * 4
    assert [note for note in pruned.notes() if "weighed by" in note] == [f"layers weighed by {WEIGHINGS[best]}"]


def test_models_are_judged_on_images_that_were_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, 1, 2, 3)
    plan = plan_of("vit", "prune.reweigh=1")
    plan.held_back = batches(3)
    prune_model(plan, Budget(sparsity=0.5), quiet)
    assert len(watched.images) == 4
    assert all(images is plan.held_back for images in watched.images)


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_as_many_rounds_as_asked_for(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    watched = Watched(monkeypatch, 9, 8, 7, 6, 5)
    prune_model(plan_of("vit", f"prune.reweigh={rounds}"), Budget(sparsity=0.5), quiet)
    assert len(watched.models) == (rounds + 2 if rounds else 0)


def output_gradients(model: nn.Module, name: str) -> tuple[Tensor, int]:
    """The squares of dL/dy [out] of one layer, summed over tokens, image by image in float64; and how many images."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    seen: dict[str, Any] = {}
    model.get_submodule(name).register_forward_hook(lambda _, i, y: seen.update(y=y))
    total, count = torch.zeros(model.get_submodule(name).out_features).double(), 0  # type: ignore[arg-type]
    for images, labels in batches(10, 14):
        for image, label in zip(images, labels, strict=True):
            loss = F.cross_entropy(model(image[None].double()), label[None])
            (gradient,) = torch.autograd.grad(loss, seen["y"])
            total += gradient.flatten(0, -2).square().sum(dim=0)
            count += 1
    return total, count


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"])
def test_gradients_of_the_pruned_model_are_added_to_those_of_the_dense_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The distortion of a whole block row grows as its outputs' squared gradients do."""
    watched = Watched(monkeypatch, 2, 3, 1)
    plan = plan_of("vit", "prune.reweigh=1")
    _, pruned = prune_model(plan, Budget(sparsity=0.6), quiet)
    dense, images = output_gradients(plan.model, name)
    after, _ = output_gradients(watched.models[0], name)
    greedy = plan.groups[name].options[0].removal.by_row
    assert greedy is not None
    errors = greedy[1]
    ratio = torch.stack([(a + d).sum() / d.sum() for a, d in zip(after.split(16), dense.split(16), strict=True)])
    expected = (errors.sum(dim=1) * ratio).sum()
    got = pruned.option(name).removal.distortion[-1]
    assert float(got) == pytest.approx(float(expected), rel=1e-3)
    assert float(expected) > 1.2 * float(errors.sum())
    assert images == plan.statistics[name].images


@pytest.mark.parametrize("patterns", ["neurons", "heads", "balanced"])
def test_patterns_are_weighed_anew_too(patterns: str) -> None:
    plan = plan_of("vit", "prune.reweigh=2", f"prune.patterns=[{patterns}]")
    model, pruned = prune_model(plan, Budget(flops=0.6), quiet)
    assert plan.predict(pruned).flops <= 0.6 * plan.flops.total
    assert model(batches(2)[0][0]).isfinite().all()


def test_methods_without_compensation_are_not_weighed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    prune_model(plan_of("vit", "prune.reweigh=2", "prune.method=taylor"), Budget(sparsity=0.5), quiet)
    assert not watched.models
