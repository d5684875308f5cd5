"""Weights from files: what fits, what is damaged, and pickles that are never loaded."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from helpers import relative
from safetensors.torch import save_file
from small import KWARGS, VIT, Tensors, Trap, one_line, outputs, tiny

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.models.build import build_model
from lpvit_cli.models.tensors import read_tensors
from lpvit_cli.recipe.model import ModelSection


def weights(folder: Path, change: Callable[[Tensors], object] = lambda tensors: None) -> ModelSection:
    tensors = dict(tiny().state_dict())
    change(tensors)
    path = folder / "w.safetensors"
    save_file(tensors, path)
    return ModelSection(name=VIT, kwargs=KWARGS, weights=path)


def test_weights_are_loaded(tmp_path: Path) -> None:
    section = weights(tmp_path, lambda tensors: tensors["head.bias"].copy_(torch.arange(5.0)))
    torch.manual_seed(5)
    model, origin = build_model(section), tiny()
    assert torch.equal(model.head.bias, torch.arange(5.0))
    assert relative(outputs(model), outputs(origin) + torch.arange(5.0) - origin.head.bias) < 1e-5


def test_a_model_without_a_head_needs_none_in_the_file(tmp_path: Path) -> None:
    headless = weights(tmp_path).model_copy(update={"kwargs": {**KWARGS, "num_classes": 0}})
    model, origin = build_model(headless), tiny()
    assert (model.num_classes, model.gives) == (0, "pooled")
    origin.reset_classifier(0)
    assert relative(outputs(model), outputs(origin)) < 1e-6
    weights(tmp_path, lambda tensors: tensors.update({"heads.weight": torch.ones(1)}))
    with pytest.raises(EnvironmentFault, match="has foreign tensors: heads.weight$"):
        build_model(headless)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("head.bias"), "misses: head.bias$"),
        (lambda t: [t.pop("norm.weight"), t.pop("head.bias"), t.pop("pos_embed")], "misses: head.bias and 2 more$"),
        (lambda t: t.update(extra=torch.ones(1)), "has foreign tensors: extra$"),
        (lambda t: t.update(a=torch.ones(1), b=torch.ones(1)), "has foreign tensors: a and 1 more$"),
        (lambda t: t.update({"head.weight": torch.ones(6, 64)}), r"has other shapes: head.weight \[6, 64\] for \[5, 64\]$"),
        (lambda t: t.update({"head.bias": torch.ones(1, 5)}), r"has other shapes: head.bias \[1, 5\] for \[5\]$"),
        (lambda t: t.update({"module.head.bias": t.pop("head.bias")}), "misses: head.bias$"),
    ],
)
def test_weights_of_another_model(tmp_path: Path, change: Callable[[Tensors], object], complaint: str) -> None:
    with pytest.raises(EnvironmentFault, match=complaint) as caught:
        build_model(weights(tmp_path, change))
    assert one_line(caught.value).startswith(f"{tmp_path / 'w.safetensors'}: does not fit the model")
    assert "model.kwargs" in caught.value.hint


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pth", "."])
def test_weights_that_are_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no such weights file") as caught:
        build_model(ModelSection(name=VIT, kwargs=KWARGS, weights=tmp_path / name))
    assert str(tmp_path / name) in one_line(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:40],
        lambda content: content[:3],
        lambda content: b"",
        lambda content: b"not a safetensors file\n" * 100,
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content[:20] + b"\0" + content[21:],
    ],
)
def test_damaged_weights(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    section = weights(tmp_path)
    assert section.weights
    section.weights.write_bytes(damage(section.weights.read_bytes()))
    with pytest.raises(EnvironmentFault, match=r"w\.safetensors: not a readable safetensors file") as caught:
        build_model(section)
    one_line(caught.value)


def write_checkpoint(path: Path, content: object, how: str | int) -> None:
    if isinstance(how, int):
        path.write_bytes(pickle.dumps(content, protocol=how))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")


PICKLED = [
    *((name, "zip") for name in ("x.pth", "x.pt", "x.bin", "x.ckpt", "x.pkl", "x.pth.tar")),
    *(("renamed.safetensors", how) for how in ("zip", "legacy", 2, 3, 4, 5)),
    ("x.weights", "zip"),
    ("x.pth", 4),
]


@pytest.mark.parametrize(("name", "how"), PICKLED)
def test_pickles_are_refused_and_never_loaded(tmp_path: Path, name: str, how: str | int) -> None:
    path, sprung = tmp_path / name, tmp_path / "sprung"
    write_checkpoint(path, {"model": Trap(sprung)}, how)
    with pytest.raises(EnvironmentFault, match="is a pickled checkpoint") as caught:
        build_model(ModelSection(name=VIT, kwargs=KWARGS, weights=path))
    assert str(path) in one_line(caught.value)
    assert not sprung.exists()
    if isinstance(how, int):
        pickle.loads(path.read_bytes())
    else:
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert sprung.exists(), "the trap of this test does not work"


@pytest.mark.parametrize("name", ["x.pth", "text.bin"])
def test_a_pickle_is_known_by_its_name_too(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("whatever it holds")
    with pytest.raises(EnvironmentFault, match="is a pickled checkpoint"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"model": t, "epoch": 3}, lambda t: {"state_dict": t}])
def test_the_hint_for_pickles_converts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Tensors], object]
) -> None:
    tensors = dict(tiny().state_dict())
    torch.save(wrap(tensors), tmp_path / "x.pth")
    with pytest.raises(EnvironmentFault) as caught:
        read_tensors(tmp_path / "x.pth")
    before, code, after = caught.value.hint.split('"')
    assert (before, after) == ("convert: python -c ", "")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    converted = read_tensors(tmp_path / "x.converted.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("name", "prefix"), [("vit_tiny_patch16_224", 1), ("vit_small_patch14_reg4_dinov2", 0)])
def test_positions_of_another_image_size_are_resampled_as_timm_does(tmp_path: Path, name: str, prefix: int) -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    large = timm.create_model(name, img_size=64, **kwargs)
    torch.nn.init.normal_(large.pos_embed)
    save_file(large.state_dict(), tmp_path / "large.safetensors")
    small = timm.create_model(name, img_size=32, **kwargs)
    expected = checkpoint_filter_fn(large.state_dict(), small)["pos_embed"]
    built = build_model(ModelSection(name=name, kwargs={"img_size": 32, **kwargs}, weights=tmp_path / "large.safetensors"))
    assert torch.equal(built.pos_embed, expected)
    assert built.pos_embed.shape[1] == 16 + prefix
