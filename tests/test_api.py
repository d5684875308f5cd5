"""lpvit from Python: the same engine as the commands', on any module; the examples run."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import relative, run_cli
from torch import Tensor, nn
from torch.nn import functional as F

import lpvit_cli as lpvit
from lpvit_cli import Recipe
from lpvit_cli.data.splits import calibration_batches
from lpvit_cli.errors import CheckFailed, UsageError
from lpvit_cli.models.build import build_model
from lpvit_cli.tasks.features import Features

EXAMPLES = Path(__file__).parent.parent / "examples"


class Own(nn.Module):
    """Tokens [n, tokens, 24] -> features [n, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(24, 64), nn.Linear(64, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.second(x)).mean(dim=1))  # type: ignore[no-any-return]


@pytest.fixture
def own() -> Own:
    torch.manual_seed(0)
    return Own()


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 10, 24, generator=torch.Generator().manual_seed(seed))


def test_a_timm_model_is_pruned_as_the_command_prunes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the precision of the API, and without images held back, of which the API has none."""
    monkeypatch.setattr("lpvit_cli.pruning.planning.held_back_batches", lambda *_: None)
    changes = [
        "calibrate.images=48",
        "calibrate.gradient=sampled",
        "prune.budget.sparsity=0.6",
        "prune.reweigh=1",
        "data.val_images=8",
        "device=cpu",
        "dtype=float32",
    ]
    options = [option for change in changes for option in ("--set", change)]
    for command in ("calibrate", "prune"):
        result = run_cli(command, "digits_vit", "-o", tmp_path / "run", *options)
        assert result.code == 0, result.err
    expected = lpvit.load_model(tmp_path / "run" / "pruned")

    recipe = Recipe.load("digits_vit", changes)
    model = build_model(recipe.model, recipe.task, recipe.features)
    images = calibration_batches(recipe.data, recipe.calibrate, recipe.seed, model)
    pruned = lpvit.prune(model, images, sparsity=0.6, block=recipe.prune.blocks[0], reweigh=1, device="cpu")
    made, known = lpvit.sparse_layers(pruned), lpvit.sparse_layers(expected)
    assert made.keys() == known.keys()
    for name, layer in made.items():
        assert torch.equal(layer.weight.block_mask, known[name].weight.block_mask)
        assert relative(layer.values, known[name].values) < 1e-5


def test_the_given_model_and_images_stay_as_they_are(own: Own) -> None:
    own.train()
    before, images = copy.deepcopy(own.state_dict()), tokens(40)
    untouched = images.clone()
    pruned = lpvit.prune(own, images, flops=0.6, block=(16, 8), task="features")
    assert own.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert torch.equal(images, untouched)
    assert not images.requires_grad
    assert not pruned.training


def test_layers_that_give_the_output_or_are_not_called_stay_dense(own: Own) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.attention, self.head = Own(), nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)[:, None]
            return self.head(self.attention(y, y, y, need_weights=False)[0][:, 0])  # type: ignore[no-any-return]

    pruned = lpvit.prune(Headed(), tokens(40), sparsity=0.3, block=(8, 8))
    assert list(lpvit.sparse_layers(pruned)) == ["body.first", "body.second", "body.last"]
    chosen = lpvit.prune(own, tokens(40), sparsity=0.3, block=(8, 8), layers="s*", task="features")
    assert list(lpvit.sparse_layers(chosen)) == ["second"]


def test_budgets_are_met_within_a_block(own: Own) -> None:
    pruned = lpvit.prune(own, [tokens(16), tokens(16, 2)], sparsity=0.5, block=(16, 8), task="features")
    layers = lpvit.sparse_layers(pruned).values()
    total = sum(layer.out_features * layer.in_features for layer in layers)
    kept = sum(int((layer.weight.to_dense() != 0).sum()) for layer in layers)
    assert 0.5 * total - 16 * 8 <= kept <= 0.5 * total


def test_compensation_keeps_features_nearer_than_magnitude(own: Own) -> None:
    """On images that calibration has not seen."""
    fresh = tokens(64, seed=9)
    error = {}
    for method in ("obs", "magnitude"):
        pruned = lpvit.prune(own, tokens(64), sparsity=0.5, block=(8, 8), method=method, task="features")
        error[method] = relative(pruned(fresh), own.eval()(fresh))
    assert error["obs"] < 0.6 * error["magnitude"]


def test_recovery_follows_the_teacher_and_fills_no_zero(own: Own) -> None:
    images, fresh = [tokens(16, seed) for seed in range(12)], tokens(64, seed=99)
    pruned = lpvit.prune(own, images, sparsity=0.7, block=(8, 8), task="features", reweigh=0)
    masks = {name: layer.weight.block_mask.clone() for name, layer in lpvit.sparse_layers(pruned).items()}
    state = copy.deepcopy(pruned.state_dict())
    recovered = lpvit.recover(pruned, own, images, epochs=8, task="features", method="full", lr=2e-3)
    assert all(torch.equal(tensor, state[name]) for name, tensor in pruned.state_dict().items()), "a copy was trained"
    for name, layer in lpvit.sparse_layers(recovered).items():
        assert torch.equal(layer.weight.block_mask, masks[name])
    dense = own.eval()(fresh)
    assert relative(recovered(fresh), dense) < 0.8 * relative(pruned(fresh), dense)


def test_recovery_that_helps_nothing_gives_the_model_back(own: Own) -> None:
    images = [tokens(16, seed) for seed in range(4)]
    pruned = lpvit.prune(own, images, sparsity=0.5, block=(8, 8), task="features", reweigh=0)
    ruined = lpvit.recover(pruned, own, images, epochs=1, task="features", method="full", lr=100.0)
    assert relative(ruined(images[0]), pruned(images[0])) < 1e-6


@pytest.mark.parametrize("precision", ["float32", "int8", "float16"])
def test_the_file_gives_the_models_outputs(own: Own, tmp_path: Path, precision: str) -> None:
    pruned = lpvit.prune(own, tokens(32), sparsity=0.5, block=(16, 8), task="features")
    file = lpvit.export_onnx(pruned, tokens(3), tmp_path / "own.onnx", form="rows", precision=precision)
    assert [path.name for path in tmp_path.iterdir()] == ["own.onnx"]
    assert file.bytes == file.path.stat().st_size
    session = onnxruntime.InferenceSession(file.path, providers=["CPUExecutionProvider"])
    x = tokens(7, seed=5)
    (y,) = session.run(None, {"images": x.numpy()})
    assert relative(torch.from_numpy(np.asarray(y)), pruned(x)) < {"float32": 1e-5, "float16": 1e-2, "int8": 0.1}[precision]


def test_a_file_that_differs_is_not_left(own: Own, tmp_path: Path) -> None:
    pruned = lpvit.prune(own, tokens(32), sparsity=0.5, block=(16, 8), task="features")
    with pytest.raises(CheckFailed, match="differs from the model by"):
        lpvit.export_onnx(pruned, tokens(3), tmp_path / "own.onnx", form="rows", precision="int8", tolerance=1e-9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "give exactly one budget as an argument"),
        ({"sparsity": 0.5, "flops": 0.5}, "give exactly one budget as an argument"),
        ({"budget": {"sparsity": 0.5}}, "give exactly one budget as an argument"),
        ({"latency_ms": 1.0}, "latency_ms needs a device profile"),
        ({"sparsity": 0.5, "gradient": "foo"}, "there is none called 'foo'"),
        ({"sparsity": 0.5, "gradient": "empirical"}, "'empirical' needs labels"),
        ({"sparsity": 0.5, "images": (tokens(8), torch.zeros(8))}, "a pair .* is no iterable of batches"),
        ({"sparsity": 2}, "budget.sparsity: should be less than 1 "),
        ({"sparsity": 0.5, "metod": "obs"}, "metod: unknown key"),
        ({"sparsity": 0.5, "method": "best"}, "method: should be 'obs'"),
        ({"sparsity": 0.5, "layers": "nothing.*"}, r"nothing.\* matches no linear layer"),
        ({"sparsity": 0.5, "task": "detection"}, "there is none called 'detection'"),
        ({"max_drop": 1.0}, "max_drop needs images to evaluate on"),
        ({"sparsity": 0.5, "block": (128, 8)}, "128x8 is larger than layer"),
    ],
)
def test_bad_arguments(own: Own, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        lpvit.prune(own, **{"images": tokens(8), "block": (8, 8), **arguments})


def test_other_bad_input(own: Own, tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(UsageError, match="images: there are none"):
        lpvit.prune(own, [], sparsity=0.5)
    with pytest.raises(UsageError, match="gives a tuple, not one tensor"):
        lpvit.prune(Two(), tokens(8), sparsity=0.5)
    with pytest.raises(UsageError, match="no layer of this model is block-sparse"):
        lpvit.recover(own, own, tokens(8))
    with pytest.raises(UsageError, match="epochs: should be greater than 0"):
        lpvit.recover(own, own, tokens(8), epochs=0)
    for key, value in {"distill": None, "augment": True, "label_smoothing": 0.1, "target_top1": 90}.items():
        with pytest.raises(UsageError, match=f"{key} has no meaning here"):
            lpvit.recover(own, own, tokens(8), **{key: value})
    with pytest.raises(UsageError, match="no such folder"):
        lpvit.export_onnx(own, tokens(1), tmp_path / "none" / "x.onnx")
    with pytest.raises(UsageError, match="form 'best'"):
        lpvit.export_onnx(own, tokens(1), tmp_path / "x.onnx", form="best")


def test_the_loss_of_features_has_the_true_fisher_of_a_gaussian() -> None:
    """E[d d^T] = J^T J for d = J^T v: of a linear map the sum over many v of (W^T v)(W^T v)^T tends to W^T W."""
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(20_000, 4, requires_grad=True)
    Features().loss("any", 0)(F.linear(x, weight), torch.zeros(20_000)).backward()
    assert x.grad is not None
    assert relative(x.grad.T @ x.grad / 20_000, weight.T @ weight) < 0.03


def test_the_divergence_of_features_is_relative_to_their_variance() -> None:
    reference = torch.tensor([[1.0, 0.0], [3.0, 4.0]])  # variances 1 and 4
    assert Features().divergence(reference + torch.tensor([0.0, 1.0]), reference) == pytest.approx(0.5 / 2.5)
    assert Features().divergence(reference, reference) == 0


@pytest.mark.parametrize("example", ["prune_own_module.py", "prune_torchvision.py"])
def test_example(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    said = capsys.readouterr().out
    assert "kept blocks" in said or "same class for" in said
