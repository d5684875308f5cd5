"""Statistics against the same sums written out token by token in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import relative
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli.curvature import LayerStatistics, collect, load_statistics, save_statistics
from lpvit_cli.curvature.outputs import output_moments
from lpvit_cli.errors import CheckFailed, EnvironmentFault, UsageError
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.tasks.classification import Classification, calibration_loss, class_probabilities

CPU = torch.device("cpu")


def images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.randint(5, (count,), generator=generator)


def oracle(model: nn.Module, name: str, x: Tensor, labels: Tensor, gradient: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of x x^T, of d d^T and of the weight gradient, image by image in float64."""
    model = model.double()
    layer = model.get_submodule(name)
    seen = {}
    layer.register_forward_hook(lambda _, i, o: seen.update(x=i[0], y=o))
    outer = square = weight_gradient = 0
    for image, label in zip(x.double(), labels, strict=True):
        logits = model(image[None])
        loss = logits.square().mean() if gradient == "logits" else F.cross_entropy(logits, label[None])
        d, g = torch.autograd.grad(loss, [seen["y"], layer.weight])
        tokens = seen["x"].flatten(0, -2)
        outer = outer + sum(torch.outer(t, t) for t in tokens)
        square = square + sum(torch.outer(t, t) for t in d.flatten(0, -2))
        weight_gradient = weight_gradient + g
    return outer, square, weight_gradient


@pytest.mark.parametrize("gradient", ["logits", "empirical"])
@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"])
def test_statistics_equal_sums_over_single_images(tiny_vit: nn.Module, gradient: str, name: str) -> None:
    x, labels = images(6)
    layers = prunable_layers(tiny_vit, Layers())
    batches = [(x[:4], labels[:4]), (x[4:], labels[4:])]  # uneven batches must weigh by image
    found = collect(tiny_vit, layers, batches, calibration_loss(gradient, 0), CPU, lambda done: None)[name]
    found_values = (found.A.clone(), found.G.clone(), found.gradient.clone())
    tiny_vit.requires_grad_(True)
    for value, expected in zip(found_values, oracle(tiny_vit, name, x, labels, gradient), strict=True):
        assert relative(value, expected) < 2e-5
    assert (found.tokens, found.images, found.tokens_per_image) == (6 * 17, 6, 17)


def test_output_moments_alone_are_those_of_calibration(tiny_vit: nn.Module) -> None:
    x, labels = images(6)
    layers = prunable_layers(tiny_vit, Layers())
    batches = [(x[:4], labels[:4]), (x[4:], labels[4:])]
    whole = collect(tiny_vit, layers, batches, calibration_loss("empirical", 0), CPU, lambda done: None)
    heights = {name: 16 * (1 + number % 3) for number, name in enumerate(layers)}  # 48: the last block row is lower
    alone, tokens = output_moments(tiny_vit, heights, batches, calibration_loss("empirical", 0), CPU)
    assert alone.keys() == tokens.keys() == whole.keys()
    for name, squares in alone.items():
        rows = torch.arange(len(squares)) // heights[name]
        assert relative(squares, whole[name].G * (rows[:, None] == rows)) < 1e-5
        assert [len(of_batch) for of_batch in tokens[name]] == [4 * 17, 2 * 17]
        assert float(torch.cat(tokens[name]).sum()) == pytest.approx(float(whole[name].G.trace()), rel=1e-5)
    assert all(parameter.grad is None for parameter in tiny_vit.parameters())


def test_of_output_moments_only_the_blocks_on_the_diagonal_are_gathered_where_asked(tiny_vit: nn.Module) -> None:
    """All other statistics are as they are with all of them."""
    layers = prunable_layers(tiny_vit, Layers())
    whole, part = (
        collect(tiny_vit, layers, [images(6)], calibration_loss("empirical", 0), CPU, lambda done: None, height=height)
        for height in (None, 40)  # the last block row is lower
    )
    for name, found in part.items():
        rows = torch.arange(len(found.G)) // 40
        assert relative(found.G, whole[name].G * (rows[:, None] == rows)) < 1e-6
        for field in ("A", "weighted", "gradient"):
            assert torch.equal(getattr(found, field), getattr(whole[name], field))


def test_sampled_labels_have_the_models_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]]).repeat(4000, 1).requires_grad_()
    calibration_loss("sampled", 0)(logits, torch.zeros(4000, dtype=torch.long)).backward()
    p = logits.detach()[0].softmax(0)
    drawn = (p - logits.grad).round()  # the gradient of cross-entropy is p - onehot
    assert relative(drawn.mean(0), p) < 0.03


def test_layer_called_only_by_its_weight_is_refused() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.bypassed = nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + F.linear(x, self.bypassed.weight)

    model = Functional()
    layers = {"used": model.used, "bypassed": model.bypassed}
    with pytest.raises(UsageError, match="1 of 2 layers are not called as modules in this architecture, .*: bypassed$"):
        collect(
            model,
            layers,
            [(torch.randn(2, 3, 4)[:, 0], torch.tensor([0, 1]))],
            calibration_loss("empirical", 0),
            CPU,
            lambda done: None,
        )


def test_file_round_trip_and_damage(tiny_vit: nn.Module, tmp_path) -> None:  # type: ignore[no-untyped-def]
    layers = prunable_layers(tiny_vit, Layers(include=("*.qkv",)))
    statistics = collect(tiny_vit, layers, [images(2)], calibration_loss("empirical", 0), CPU, lambda done: None)
    path = tmp_path / "s.safetensors"
    save_statistics(path, statistics, layers)
    back = load_statistics(path, layers)
    for name in layers:
        assert torch.equal(back[name].hessian, statistics[name].hessian)
        assert torch.equal(back[name].mean_gradient, statistics[name].mean_gradient)
        assert torch.equal(back[name].output_moment, statistics[name].output_moment)
        assert (back[name].tokens, back[name].images) == (statistics[name].tokens, statistics[name].images) == (34, 2)
    with pytest.raises(EnvironmentFault, match="unreadable statistics"):
        load_statistics(path, {"blocks.9.attn.qkv": layers["blocks.0.attn.qkv"]})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EnvironmentFault, match="unreadable statistics"):
        load_statistics(path, layers)
    path.unlink()
    with pytest.raises(EnvironmentFault, match="unreadable statistics"):
        load_statistics(path, layers)


def test_statistics_of_other_weights_are_refused(tiny_vit: nn.Module, tmp_path: Path) -> None:
    layers = prunable_layers(tiny_vit, Layers(include=("*.fc1",)))
    statistics = collect(tiny_vit, layers, [images(2)], calibration_loss("empirical", 0), CPU, lambda done: None)
    path = tmp_path / "s.safetensors"
    save_statistics(path, statistics, layers)
    one = "blocks.1.mlp.fc1"
    assert load_statistics(path, {one: layers[one]}).keys() == {one}
    layers[one].weight.data = layers[one].weight.data.flip(0)  # the same numbers in another order
    differ = f"of another model, or of one in another order: the weights of {one} differ"
    with pytest.raises(EnvironmentFault, match=differ) as caught:
        load_statistics(path, layers)
    assert caught.value.hint == "run `lpvit calibrate --no-resume`"
    old = load_file(path)
    save_file(old, path)  # as lpvit 0.2 wrote it, without fingerprints
    assert load_statistics(path, layers).keys() == layers.keys()
    save_file(old, path, {"weights": "{"})
    with pytest.raises(EnvironmentFault, match="unreadable statistics"):
        load_statistics(path, layers)


def test_sums_become_means_over_tokens_or_over_images() -> None:
    """5 tokens of 2 images: H = 2/5 sum x^T x and S = 1/5 sum d^T d by token, g by image, 2.5 tokens an image."""
    outer, square, gradient = torch.tensor([[10.0, 5.0], [5.0, 20.0]]), torch.tensor([[15.0]]), torch.tensor([[6.0, -8.0]])
    statistics = LayerStatistics(outer, square, gradient, 2 * outer, tokens=5, images=2)
    assert torch.equal(statistics.hessian, torch.tensor([[4.0, 2.0], [2.0, 8.0]]))
    assert torch.equal(statistics.output_moment, torch.tensor([[3.0]]))
    assert torch.equal(statistics.mean_gradient, torch.tensor([[3.0, -4.0]]))
    assert statistics.tokens_per_image == 2.5


def test_tokens_weigh_as_much_as_the_loss_depends_on_them(tiny_vit: nn.Module) -> None:
    """2 sum over tokens of (10 |d|^2 / mean |d|^2 + 1) / 11 x^T x / N, written out image by image in float64."""
    name, (x, labels) = "blocks.0.mlp.fc2", images(6)
    layers = prunable_layers(tiny_vit, Layers())
    batches = [(x[:4], labels[:4]), (x[4:], labels[4:])]
    found = collect(tiny_vit, layers, batches, calibration_loss("empirical", 0), CPU, lambda done: None)[name]
    model, seen = copy.deepcopy(tiny_vit).double().requires_grad_(True), {}
    model.get_submodule(name).register_forward_hook(lambda _, i, o: seen.update(x=i[0], y=o))
    tokens, weights = [], []
    for image, label in zip(x.double(), labels, strict=True):
        (d,) = torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), seen["y"])
        tokens.append(seen["x"].flatten(0, -2))
        weights.append(d.flatten(0, -2).square().sum(dim=1))
    seen_tokens, weight = torch.cat(tokens).detach(), torch.cat(weights)
    mixed = (10 * weight / weight.mean() + 1) / 11
    assert relative(found.token_hessian, 2 * (seen_tokens * mixed[:, None]).T @ seen_tokens / len(mixed)) < 2e-5
    assert relative(found.hessian, found.token_hessian) > 0.05, "equal weights would do too"


def test_tokens_that_no_loss_depends_on_weigh_the_same() -> None:
    outer, nothing = torch.tensor([[10.0, 5.0], [5.0, 20.0]]), torch.zeros(1, 1)
    statistics = LayerStatistics(outer, nothing, torch.zeros(1, 2), torch.zeros(2, 2), tokens=5, images=2)
    assert torch.equal(statistics.token_hessian, statistics.hessian)


class Dropping(nn.Module):
    """A layer behind dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dropout = nn.Linear(6, 5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.dropout(x))


def collected(model: nn.Module, gradient: str = "empirical", seed: int = 0) -> LayerStatistics:
    batches = [(torch.linspace(-1, 1, 24).reshape(4, 6), torch.tensor([0, 1, 2, 3]))] * 2
    return collect(model, {"layer": model.layer}, batches, calibration_loss(gradient, seed), CPU, lambda done: None)["layer"]


def test_a_model_in_training_is_measured_as_it_will_be_used() -> None:
    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    assert relative(collected(Dropping().train()).A, 2 * x.T @ x) < 1e-6


def test_gradients_from_before_do_not_count_and_none_are_left() -> None:
    expected, model = collected(Dropping()), Dropping()
    model.layer.weight.grad = torch.full((5, 6), 100.0)
    assert torch.equal(collected(model).gradient, expected.gradient)
    assert model.layer.weight.grad is None
    assert torch.equal(collected(model).gradient, expected.gradient)


def test_drawn_labels_follow_the_seed() -> None:
    torch.manual_seed(1)
    first = collected(Dropping(), "sampled", seed=3).gradient
    torch.manual_seed(2)
    assert torch.equal(collected(Dropping(), "sampled", seed=3).gradient, first)
    assert not torch.equal(collected(Dropping(), "sampled", seed=4).gradient, first)


def test_images_done_are_told_after_every_batch(tiny_vit: nn.Module) -> None:
    x, labels = images(7)
    batches = [(x[:4], labels[:4]), (x[4:6], labels[4:6]), (x[6:], labels[6:])]
    told: list[int] = []
    collect(tiny_vit, prunable_layers(tiny_vit, Layers()), batches, calibration_loss("logits", 0), CPU, told.append)
    assert told == [4, 6, 7]


def test_layer_whose_output_reaches_no_logit_is_refused() -> None:
    class Ignoring(Dropping):
        def __init__(self) -> None:
            super().__init__()
            self.ignored = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.ignored(x).detach()

    model = Ignoring()
    layers = {"layer": model.layer, "ignored": model.ignored}
    with pytest.raises(UsageError, match="ignored changes nothing that the model gives"):
        collect(
            model, layers, [(torch.randn(2, 6), torch.tensor([0, 1]))], calibration_loss("empirical", 0), CPU, lambda done: None
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_no_numbers_name_the_layer(tiny_vit: nn.Module, value: float) -> None:
    x, labels = images(2)
    x[1, 0, 3, 3] = value
    with pytest.raises(CheckFailed, match=r"input_outer of blocks.0.attn.qkv holds NaN or infinite values"):
        collect(
            tiny_vit,
            prunable_layers(tiny_vit, Layers()),
            [(x, labels)],
            calibration_loss("empirical", 0),
            CPU,
            lambda done: None,
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_files_of_statistics_that_are_no_numbers_name_the_layer(tiny_vit: nn.Module, tmp_path: Path, value: float) -> None:
    layers = prunable_layers(tiny_vit, Layers(include=("*.fc1",)))
    statistics = collect(tiny_vit, layers, [images(2)], calibration_loss("empirical", 0), CPU, lambda done: None)
    statistics["blocks.1.mlp.fc1"].G[0, 0] = value
    save_statistics(tmp_path / "s.safetensors", statistics, layers)
    with pytest.raises(EnvironmentFault, match=r"output_outer of blocks.1.mlp.fc1 holds NaN or infinite values"):
        load_statistics(tmp_path / "s.safetensors", layers)


def test_partial_statistics_add_up(tiny_vit: nn.Module, tmp_path: Path) -> None:
    """Two processes with some images each, merged, are one process with all of them."""
    x, labels = images(6)
    layers = prunable_layers(tiny_vit, Layers(include=("*.fc1",)))

    def part(images: slice) -> dict[str, LayerStatistics]:
        return collect(
            tiny_vit, layers, [(x[images], labels[images])], calibration_loss("empirical", 0), CPU, lambda done: None
        )

    whole, first, second = part(slice(0, 6)), part(slice(0, 2)), part(slice(2, 6))
    for name in layers:
        together = first[name] + second[name]
        assert (together.tokens, together.images) == (whole[name].tokens, 6)
        assert relative(together.hessian, whole[name].hessian) < 1e-5
        assert relative(together.output_moment, whole[name].output_moment) < 1e-5
        assert relative(together.mean_gradient, whole[name].mean_gradient) < 1e-4


# how far a pruned model is from its parent


def divergence(model: nn.Module, target: Tensor, batches: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    task = Classification()
    return task.divergence(task.outputs(model, batches, device), target)


def test_divergence_is_the_mean_of_the_kullback_leibler_divergences_of_all_images(tiny_vit: nn.Module) -> None:
    """Of P (the parent's classes) from Q: sum p log(p / q), by scipy; batches of unequal size weigh by image."""
    from scipy.special import rel_entr

    other = copy.deepcopy(tiny_vit)
    other.head.weight.data *= -3
    x, labels = images(7)
    batches = [(x[:5], labels[:5]), (x[5:], labels[5:])]
    target = class_probabilities(tiny_vit, batches, CPU)
    p, q = ((copy.deepcopy(m).double()(x.double())).softmax(dim=1).detach() for m in (tiny_vit, other))
    assert relative(target, p) < 1e-5
    expected = float(rel_entr(p.numpy(), q.numpy()).sum(axis=1).mean())
    assert divergence(other, target, batches, CPU) == pytest.approx(expected, rel=1e-4)
    assert abs(divergence(tiny_vit, target, batches, CPU)) < 1e-6
    assert expected > 0.01


def test_divergence_is_finite_where_a_model_is_certain_of_the_wrong_class() -> None:
    class Certain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[1000.0, 0.0]]).expand(len(x), -1)

    found = divergence(Certain(), torch.tensor([[0.0, 1.0]]), [(torch.zeros(1, 3), torch.zeros(1))], CPU)
    assert found == pytest.approx(87.3, abs=0.1), "minus the logarithm of the smallest normal float32"


def test_a_model_is_moved_to_the_device_before_inference_mode() -> None:
    """A weight moved in inference mode serves no backward pass, and the pruned model's gradients are asked for next."""

    class Moved(nn.Linear):
        def to(self, *place: object) -> Moved:
            assert not torch.is_inference_mode_enabled()
            return self

        def forward(self, x: Tensor) -> Tensor:
            assert torch.is_inference_mode_enabled()
            return super().forward(x)

    assert class_probabilities(Moved(3, 2), [(torch.zeros(4, 3), torch.zeros(4))], CPU).shape == (4, 2)
