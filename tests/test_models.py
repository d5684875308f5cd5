"""Models in and out: names and weights that are refused, model folders whole and damaged, layers, devices, small copies."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from helpers import relative
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lpvit_cli
from lpvit_cli.data.transforms import transform_for
from lpvit_cli.devices import autocast, pick_device, pick_dtype
from lpvit_cli.errors import EnvironmentFault, LpvitError, UsageError
from lpvit_cli.models.families.timm import build_model, shrink
from lpvit_cli.models.folder import load_model, model_config, require_same_model, save_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.tensors import read_tensors, write_tensors
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.sparse import BlockSparseLinear, densify, sparse_layers, sparsify

VIT = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5, "qkv_bias": False}
TINY = ModelSection(name=VIT, kwargs=KWARGS)
QKV, FC1, EMPTY = "blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2"
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An offline hub client with an empty cache, and sockets that refuse should it try nevertheless."""

    def refuse(*args: object) -> None:
        raise OSError("a test must not use the network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment on import, so set too
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only lose by sharing their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def _tiny() -> nn.Module:
    torch.manual_seed(0)
    return build_model(TINY)


def tiny() -> nn.Module:
    """The same random weights every time."""
    return copy.deepcopy(_tiny())


def sparse_tiny() -> nn.Module:
    """A tenth of the blocks of every layer of block 0, and nothing at all of one layer of block 1."""
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "blocks.0" in name}
    masks = {
        name: torch.rand(layer.out_features // 16, layer.in_features // 8, generator=generator) < 0.1
        for name, layer in layers.items()
    }
    masks[EMPTY] = torch.zeros(4, 32, dtype=torch.bool)
    sparsify(model, masks, (16, 8))
    return model


def save(folder: Path, model: nn.Module) -> Path:
    save_model(folder, model, model_config(TINY, model))  # type: ignore[arg-type]
    return folder


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def outputs(model: nn.Module) -> Tensor:
    """Of a copy in fresh memory: tensors of a mapped file lie at odd addresses, where a sum may round differently."""
    return copy.deepcopy(model)(images())


def one_line(error: LpvitError) -> str:
    """The message, after checking that it is one a person can act on."""
    assert "\n" not in error.message
    assert "Traceback" not in error.message
    assert error.hint
    return error.message


# the dense model


def test_a_model_is_built_for_inference_with_random_weights() -> None:
    model = tiny()
    assert not any(module.training for module in model.modules())
    assert model(images()).shape == (3, 5)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit_tiny_patch16_244", "vit_tiny_patch16_224"),
        ("levit_129.fb_dist_in1k", "levit_128"),
        ("swin_tiny_patch4_window7", "swin_tiny_patch4_window7_224"),
    ],
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_an_unknown_name_brings_up_close_ones(name: str, near: str, pretrained: bool) -> None:
    with pytest.raises(UsageError, match=f"model.name: timm has no model '{name}'") as caught:
        build_model(ModelSection(name=name, pretrained=pretrained))
    assert caught.value.hint.startswith("did you mean ")
    assert near in caught.value.hint


def test_a_name_like_no_other() -> None:
    with pytest.raises(UsageError, match="timm has no model 'zzzqqq'") as caught:
        build_model(ModelSection(name="zzzqqq"))
    assert "timm.list_models()" in caught.value.hint


@pytest.mark.parametrize("pretrained", [False, True])
def test_an_unknown_tag_is_a_wrong_name(pretrained: bool) -> None:
    with pytest.raises(UsageError, match="model.name.*nonsense"):
        build_model(ModelSection(name=f"{VIT}.nonsense", pretrained=pretrained))


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"depht": 2}, "depht"),
        ({"embed_dim": 33, "num_heads": 2}, "divisible"),
        ({"img_size": "big"}, "str"),
        ({"pretrained": True}, "pretrained"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=f"model.kwargs: timm cannot build '{VIT}'.*{reason}") as caught:
        build_model(ModelSection(name=VIT, kwargs=kwargs))
    assert "model.kwargs" in caught.value.hint


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(UsageError, match="'test_resnet' has no linear layers") as caught:
        build_model(ModelSection(name="test_resnet", kwargs={"num_classes": 0}))
    assert "vision transformer" in caught.value.hint


@pytest.mark.parametrize(
    "section",
    [
        {"name": VIT, "pretrained": True},
        {"name": "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"},
        {"name": "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "pretrained": True},
    ],
)
def test_pretrained_weights_without_a_network(section: dict[str, Any]) -> None:
    with pytest.raises(
        EnvironmentFault, match="model.name: cannot get the pretrained weights of '" + section["name"]
    ) as caught:
        build_model(ModelSection(**section))
    one_line(caught.value)
    assert "--set model.weights=" in caught.value.hint


# preprocessing


@pytest.mark.parametrize(
    ("kwargs", "size"),
    [
        ({}, (3, 224, 224)),
        ({"img_size": 48}, (3, 48, 48)),
        ({"img_size": (32, 48)}, (3, 32, 48)),
        ({"img_size": [48, 32]}, (3, 48, 32)),
    ],
)
def test_images_have_the_size_the_model_is_built_for(kwargs: dict[str, Any], size: tuple[int, int, int]) -> None:
    model = build_model(ModelSection(name=VIT, kwargs={**kwargs, "depth": 1}))
    assert tuple(model.pretrained_cfg["input_size"]) == size
    image = transform_for(model)(Image.new("RGB", (300, 260)))
    assert image.shape == size
    assert model(image[None]).shape == (1, 1000)


@pytest.mark.parametrize(
    "overrides",
    [
        {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
        {"crop_pct": 0.5},
        {"interpolation": "nearest"},
        {"mean": (0.1, 0.2, 0.3), "crop_pct": 1.0, "interpolation": "bilinear"},
    ],
)
def test_preprocess_replaces_what_it_names_only(overrides: dict[str, Any]) -> None:
    model = build_model(ModelSection(name=VIT, kwargs=KWARGS, preprocess=overrides))  # type: ignore[arg-type]
    timms = tiny().pretrained_cfg
    assert timms["mean"] == (0.5, 0.5, 0.5), "one model's preprocessing became another's"
    assert model.pretrained_cfg == {**timms, **overrides}


def test_preprocess_changes_the_pixels() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    overrides = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.5, "interpolation": "nearest"}
    model = build_model(ModelSection(name=VIT, kwargs=KWARGS, preprocess=overrides))  # type: ignore[arg-type]
    expected = (pixels[16:48, 16:48] / 255 - overrides["mean"]) / overrides["std"]
    got = transform_for(model)(Image.fromarray(pixels)).numpy()
    assert np.abs(got - expected.transpose(2, 0, 1)).max() < 1e-5


# weights


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


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


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


# model folders


def test_a_folder_gives_the_model_back(tmp_path: Path) -> None:
    model = sparse_tiny()
    loaded = load_model(save(tmp_path / "new" / "folder", model))
    assert list(sparse_layers(loaded)) == list(sparse_layers(model)) != []
    assert torch.equal(outputs(loaded), outputs(model))
    assert not any(module.training for module in loaded.modules())
    assert loaded.num_classes == 5
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert len(loaded.get_submodule(EMPTY).values) == 0
    assert relative(outputs(loaded), outputs(densify(model))) < 1e-5


def test_a_folder_keeps_the_preprocessing(tmp_path: Path) -> None:
    changed = {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.7, "interpolation": "bilinear"}
    section = ModelSection(name=VIT, kwargs={**KWARGS, "img_size": (32, 48)}, preprocess=changed)  # type: ignore[arg-type]
    model = build_model(section)
    model.pretrained_cfg["label_names"] = list("abcde")
    save_model(tmp_path, model, model_config(section, model))
    loaded = load_model(tmp_path)
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (70, 90, 3), dtype=np.uint8))
    assert torch.equal(transform_for(loaded)(picture), transform_for(model)(picture))
    assert transform_for(loaded)(picture).shape == (3, 32, 48)
    assert loaded.pretrained_cfg["label_names"] == list("abcde")


def test_a_folder_holds_the_kept_blocks_only(tmp_path: Path) -> None:
    """config.json states how many blocks are kept, and the size of the file bears it out."""
    model = sparse_tiny()
    sparse, dense = save(tmp_path / "sparse", model), save(tmp_path / "dense", tiny())
    tensors = load_file(sparse / "model.safetensors")
    assert f"{FC1}.weight" not in tensors
    assert not any(tensor.dtype == torch.int64 for tensor in tensors.values())
    assert {tensors[f"{name}.{index}"].dtype for name in sparse_layers(model) for index in ("row_ptr", "cols")} == {torch.int32}
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (sparse, dense)]
    removed = sum(16 * 8 * (layer.weight.block_mask.numel() - len(layer.cols)) for layer in sparse_layers(model).values())
    assert sizes[1] - sizes[0] > 0.95 * 4 * removed  # the indices and their names take the rest
    assert sizes[0] < 0.5 * sizes[1]
    config = json.loads((sparse / "config.json").read_text())
    assert config["format"] == "lpvit-model"
    assert config["architecture"] == VIT
    assert config["num_classes"] == 5
    for name, layer in sparse_layers(model).items():
        out, features = layer.out_features, layer.in_features
        assert config["sparsity"][name] == {
            "shape": [out, features],
            "block": [16, 8],
            "blocks": out * features // (16 * 8),
            "kept": len(layer.cols),
        }
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["sparsity"] == {}


def test_a_folder_is_written_over(tmp_path: Path) -> None:
    save(tmp_path, sparse_tiny())
    save(tmp_path, tiny())
    assert torch.equal(outputs(load_model(tmp_path)), outputs(tiny()))


def test_wrong_indices_are_not_written(tmp_path: Path) -> None:
    model = sparse_tiny()
    model(images())  # from here on the layers have a pattern of their own, which was right when it was made
    model.get_submodule(FC1).cols[0] = 99
    with pytest.raises(ValueError, match="cols must be in"):
        save(tmp_path / "folder", model)
    assert not (tmp_path / "folder").exists()


def test_load_model_is_public(tmp_path: Path) -> None:
    assert lpvit_cli.load_model is load_model
    model = sparse_tiny()
    loaded = lpvit_cli.load_model(str(save(tmp_path, model)))
    assert isinstance(loaded.get_submodule(QKV), BlockSparseLinear)
    assert torch.equal(outputs(loaded), outputs(model))


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, lpvit_cli; assert 'load_model' in lpvit_cli.__all__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(lpvit_cli.__file__).parent.parent).returncode == 0


@pytest.mark.parametrize("path", ["absent", "empty", "empty/file"])
def test_places_that_are_no_model_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").write_text("")
    with pytest.raises(UsageError, match=f"{path}: .*config.json") as caught:
        load_model(tmp_path / path)
    assert "give a model folder" in caught.value.hint


@pytest.mark.parametrize(
    "content", [b"", b'{"half', b"[]", b"null", b"{}", b'{"format": "other-model"}', b"\xff\xfe\x00", b"pickle \x80\x04"]
)
def test_a_config_that_is_none(tmp_path: Path, content: bytes) -> None:
    (save(tmp_path, sparse_tiny()) / "config.json").write_bytes(content)
    with pytest.raises(EnvironmentFault, match=r"config\.json: unreadable: \S") as caught:
        load_model(tmp_path)
    assert "lpvit run" in caught.value.hint
    one_line(caught.value)


def test_a_folder_without_its_tensors(tmp_path: Path) -> None:
    (save(tmp_path, sparse_tiny()) / "model.safetensors").unlink()
    with pytest.raises(LpvitError, match=r"model\.safetensors"):
        load_model(tmp_path)


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Tensors]:
    folder = save(tmp_path_factory.mktemp("whole"), sparse_tiny())
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


Damage = Callable[[dict[str, Any], Tensors], object]


def layer(name: str, **changed: Any) -> Damage:
    return lambda config, tensors: config["sparsity"][name].update(changed)


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda config, tensors: tensors.update({name: change(tensors[name])})


def gone(name: str) -> Damage:
    return lambda config, tensors: tensors.pop(name)


def at(position: int, value: int) -> Callable[[Tensor], Tensor]:
    """The same indices but one."""

    def change(index: Tensor) -> Tensor:
        index = index.clone()
        index[position] = value
        return index

    return change


DAMAGED: dict[str, tuple[Damage, str]] = {
    "other block": (layer(FC1, block=[8, 8]), rf"{FC1}: blocks of \[16, 8\], config.json says \[8, 8\]"),
    "other blocks": (tensor(f"{FC1}.values", lambda t: t.reshape(-1, 8, 16)), rf"{FC1}: blocks of \[8, 16\]"),
    "no block": (lambda config, tensors: config["sparsity"][FC1].pop("block"), "block"),
    "more rows": (layer(FC1, shape=[512, 64]), f"row_ptr must be int32|{FC1}"),
    "fewer rows": (layer(FC1, shape=[250, 64]), FC1),
    "fewer columns": (layer(FC1, shape=[256, 60]), FC1),
    "half a shape": (layer(FC1, shape=[256]), f"shape|{FC1}"),
    "shape in words": (layer(FC1, shape=["large", "wide"]), "."),
    "shape a number": (layer(FC1, shape=256), "."),
    "cols too large": (tensor(f"{FC1}.cols", at(-1, 8)), r"cols must be in 0\.\.7"),
    "cols negative": (tensor(f"{FC1}.cols", at(0, -1)), r"cols must be in 0\.\.7"),
    "cols too few": (tensor(f"{FC1}.cols", lambda t: t[:-1].clone()), "cols must be int32"),
    "cols wide": (tensor(f"{FC1}.cols", Tensor.long), "cols must be int32"),
    "row_ptr too long": (tensor(f"{FC1}.row_ptr", at(-1, 10_000)), "row_ptr must ascend"),
    "row_ptr not from 0": (tensor(f"{FC1}.row_ptr", at(0, 1)), "row_ptr must ascend"),
    "row_ptr descends": (tensor(f"{FC1}.row_ptr", at(3, 9_999)), "row_ptr must ascend"),
    "row_ptr wide": (tensor(f"{FC1}.row_ptr", Tensor.long), "row_ptr must be int32"),
    "values integer": (tensor(f"{FC1}.values", Tensor.int), "values must be floating"),
    "values flat": (tensor(f"{FC1}.values", Tensor.flatten), FC1),
    "bias of another layer": (tensor(f"{FC1}.bias", lambda t: t[:10].clone()), f"{FC1}"),
    "no values": (gone(f"{FC1}.values"), f"{FC1}.values"),
    "no row_ptr": (gone(f"{FC1}.row_ptr"), f"{FC1}.row_ptr"),
    "no cols": (gone(f"{FC1}.cols"), f"{FC1}.cols"),
    "no sparse bias": (gone(f"{FC1}.bias"), f"{FC1}.bias"),
    "a bias too many": (lambda config, tensors: tensors.update({f"{QKV}.bias": torch.zeros(192)}), f"{QKV}.bias"),
    "no dense tensor": (gone("norm.weight"), "misses: norm.weight"),
    "foreign tensor": (lambda config, tensors: tensors.update(extra=torch.ones(1)), "foreign tensors: extra"),
    "forgotten layer": (lambda config, tensors: config["sparsity"].pop(FC1), f"misses: {FC1}.weight"),
    "unknown layer": (lambda config, tensors: config["sparsity"].update(nonsense={}), "nonsense"),
    "sparsity a list": (lambda config, tensors: config.update(sparsity=[]), "."),
    "no architecture": (lambda config, tensors: config.pop("architecture"), "architecture"),
    "no kwargs": (lambda config, tensors: config.pop("kwargs"), "kwargs"),
    "no preprocessing": (lambda config, tensors: config.pop("preprocessing"), "preprocessing"),
    "deeper": (lambda config, tensors: config["kwargs"].update(depth=3), "misses: blocks.2"),
    "other classes": (lambda config, tensors: config["kwargs"].update(num_classes=7), "other shapes: head"),
    "unknown architecture": (lambda config, tensors: config.update(architecture="vit_tyni"), "vit_tyni"),
    "unknown argument": (lambda config, tensors: config["kwargs"].update(depht=2), "depht"),
}


@pytest.mark.parametrize(("damage", "complaint"), DAMAGED.values(), ids=DAMAGED.keys())
def test_files_that_do_not_fit_together(
    tmp_path: Path, whole_folder: tuple[dict[str, Any], Tensors], damage: Damage, complaint: str
) -> None:
    config, tensors = copy.deepcopy(whole_folder)
    damage(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(EnvironmentFault, match=complaint) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in one_line(caught.value)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"text"])
def test_a_truncated_model(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = save(tmp_path, sparse_tiny()) / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(EnvironmentFault, match=r"model\.safetensors: not a readable safetensors file"):
        load_model(tmp_path)


def test_a_pickle_in_a_model_folder_is_not_loaded(tmp_path: Path) -> None:
    save(tmp_path, sparse_tiny())
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "model.safetensors")
    with pytest.raises(EnvironmentFault, match="is a pickled checkpoint"):
        load_model(tmp_path)
    assert not (tmp_path / "sprung").exists()


# permissions


@pytest.fixture(params=[0o002, 0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


def test_files_are_readable_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    save(tmp_path / "folder", sparse_tiny())
    for name in ("x.safetensors", "folder/model.safetensors", "folder/config.json"):
        assert mode(tmp_path / name) == oct(0o666 & ~umask), name


def test_writing_over_a_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    path.chmod(0o640)
    write_tensors(path, {"a": torch.arange(3)}, {"format": "pt", "note": "mine"})
    assert mode(path) == "0o640"
    assert read_tensors(path)["a"].tolist() == [0, 1, 2]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "mine"}


# layers


ALL = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ({}, ALL),
        ({"exclude": ("*.qkv", "*.proj")}, [name for name in ALL if "mlp" in name]),
        ({"exclude": ("blocks.0.*",)}, ALL[4:]),
        ({"include": ("*.fc1", "head"), "exclude": ("blocks.1.*",)}, [FC1, "head"]),
        ({"include": (FC1,)}, [FC1]),
        ({"include": ("*",)}, [*ALL, "head"]),
        ({"include": ("blocks.?.attn.*",)}, [name for name in ALL if "attn" in name]),
    ],
)
def test_layers_are_chosen_by_glob(globs: dict[str, Any], expected: list[str]) -> None:
    model = tiny()
    chosen = prunable_layers(model, Layers(**globs))
    assert list(chosen) == expected
    assert all(module is model.get_submodule(name) for name, module in chosen.items())


def test_layers_of_a_hierarchical_model_are_found() -> None:
    with torch.device("meta"):
        model = build_model(ModelSection(name="swin_tiny_patch4_window7_224", kwargs={"depths": (1, 1, 1, 1)}))
    chosen = prunable_layers(model, Layers())
    assert {name.split(".blocks.0.")[0] for name in chosen} == {f"layers.{i}" for i in range(4)}
    assert len(chosen) == 16


@pytest.mark.parametrize(
    "globs", [{"include": ("nothing.*",)}, {"exclude": ("*",)}, {"include": ()}, {"include": ("Blocks.*",)}]
)
def test_globs_that_match_nothing(globs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="prune.layers: no linear layer matches") as caught:
        prunable_layers(tiny(), Layers(**globs))
    assert all(glob in caught.value.message for globs_of_one_key in globs.values() for glob in globs_of_one_key)
    assert "blocks.0.attn.qkv" in caught.value.hint


# models from the hub

HUBS = {  # what the repository's config.json may say of a model that its name does not
    "arguments": (KWARGS, {"num_classes": 5, "pretrained_cfg": {"input_size": [3, 32, 32], "fixed_input_size": True}}, {}),
    "arguments without a size": (KWARGS, {"num_classes": 5, "pretrained_cfg": {"input_size": [3, 224, 224]}}, {}),
    "other preprocessing": (
        KWARGS,
        {"num_classes": 5, "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "crop_pct": 0.5}},
        {},
    ),
    "another size and pooling": (
        {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "global_pool": "avg"},
        {"num_classes": 3, "pretrained_cfg": {"input_size": [3, 48, 48], "fixed_input_size": True}},
        {},
    ),
    "the recipe's own": (KWARGS, {"num_classes": 5, "pretrained_cfg": {"input_size": [3, 32, 32]}}, {"num_classes": 7}),
}
FROM_HUB = "hf-hub:somebody/my-wonderful-model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], nn.Module]:
    """A hub of one repository, whose name is no architecture; None stands for one that cannot be reached."""
    repository = tmp_path / "repository"
    repository.mkdir()

    def download(repo_id: str, filename: str, **more: Any) -> str:
        if repo_id != FROM_HUB.removeprefix("hf-hub:") or not (repository / filename).is_file():
            raise EntryNotFoundError(f"{repo_id} has no {filename}")
        return str(repository / filename)

    def publish(which: str) -> nn.Module:
        arguments, content, _ = HUBS[which]
        taken = {"img_size": content["pretrained_cfg"]["input_size"][1], "num_classes": content["num_classes"], **arguments}
        torch.manual_seed(1)
        model = timm.create_model(VIT, **taken)
        save_file(model.state_dict(), repository / "model.safetensors")
        preprocessing = {"classifier": "head", **content["pretrained_cfg"]}
        written = {"architecture": VIT, "model_args": arguments, **content, "pretrained_cfg": preprocessing}
        (repository / "config.json").write_text(json.dumps(written))
        return model.eval()

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return publish


def unplug(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise OSError("the hub is not there")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", refuse)


@pytest.mark.parametrize("which", HUBS)
def test_a_model_from_the_hub_loads_again_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Callable[[str], nn.Module], which: str
) -> None:
    origin = hub(which)
    section = ModelSection(name=FROM_HUB, kwargs=HUBS[which][2])
    model = build_model(section)
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(2))
    expected = model(x)
    if not HUBS[which][2]:  # else its head is a new one
        assert torch.equal(expected, origin(x))
    mask = torch.rand(16, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    sparsify(model, {FC1: mask}, (16, 8))
    save_model(tmp_path / "model", model, model_config(section, model))
    require_same_model(tmp_path / "model", section)
    with pytest.raises(UsageError, match="the recipe says"):
        require_same_model(tmp_path / "model", section.model_copy(update={"kwargs": {"num_classes": 9}}))

    unplug(monkeypatch)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == (VIT, model.num_classes)
    loaded = load_model(tmp_path / "model")
    assert relative(loaded(x), model(x)) < 1e-5
    assert tuple(loaded.pretrained_cfg["input_size"]) == tuple(size)
    assert list(loaded.pretrained_cfg["mean"]) == list(model.pretrained_cfg["mean"])
    again = build_model(ModelSection(name=config["architecture"], kwargs=config["kwargs"]))  # as export and gradual build it
    shapes = [{name: t.shape for name, t in one.state_dict().items()} for one in (again, densify(loaded))]
    assert shapes[0] == shapes[1]


def test_a_small_copy_of_a_model_from_the_hub(hub: Callable[[str], nn.Module]) -> None:
    """Of its architecture, with its classes; it needs no weights, so it is built without the hub."""
    hub("arguments")
    name, small = shrink(ModelSection(name=FROM_HUB))
    model = build_model(ModelSection(name=name, kwargs=small))
    assert name == VIT
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_a_small_copy_of_what_only_the_hub_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    unplug(monkeypatch)
    with pytest.raises(EnvironmentFault, match="cannot get the pretrained weights of 'hf-hub:somebody/my-wonderful-model'"):
        shrink(ModelSection(name=FROM_HUB))


# small copies


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        (VIT, {"num_classes": 3}, (64, 64)),
        ("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", {"num_classes": 3}, (64, 64)),
        ("swin_tiny_patch4_window7_224", {"num_classes": 3}, (64, 64)),
        ("deit_base_patch16_224", {"num_classes": 3}, (64, 64)),
        (VIT, {"num_classes": 3, "img_size": 32, "patch_size": 8}, (32, 32)),
        (VIT, {"num_classes": 3, "img_size": (32, 48), "patch_size": 8}, None),
        (VIT, {"num_classes": 3, "img_size": [96, 96]}, (64, 64)),
    ],
)
def test_a_small_copy_builds_and_runs(name: str, kwargs: dict[str, Any], size: tuple[int, int] | None) -> None:
    architecture, small = shrink(ModelSection(name=name, kwargs=kwargs, pretrained=True))
    assert architecture == name.split("/")[-1]
    model = build_model(ModelSection(name=architecture, kwargs=small))
    height, width = model.pretrained_cfg["input_size"][1:]
    assert size is None or (height, width) == size
    assert max(height, width) <= 64
    logits = model(torch.randn(2, 3, height, width))
    assert logits.shape == (2, 3)
    assert bool(logits.isfinite().all())
    blocks = {layer.split(".attn")[0].split(".mlp")[0] for layer in prunable_layers(model, Layers())}
    assert len(blocks) == (4 if "swin" in name else 2)
    assert {key: small[key] for key in kwargs if key != "img_size"} == {k: v for k, v in kwargs.items() if k != "img_size"}


@pytest.mark.parametrize("section", [{"name": "zzzqqq"}, {"name": VIT, "kwargs": {"depht": 2}}])
def test_what_cannot_be_built_is_explained_by_building_it(section: dict[str, Any]) -> None:
    architecture, kwargs = shrink(ModelSection(**section))
    assert (architecture, kwargs) == (section["name"], section.get("kwargs", {}))
    with pytest.raises(UsageError, match="timm (has no model|cannot build)"):
        build_model(ModelSection(name=architecture, kwargs=kwargs))


# devices


@pytest.mark.parametrize("name", ["nonsense", "", "cuda:x", "mps", "meta", "xpu:0"])
def test_devices_that_do_not_exist_or_are_not_supported(name: str) -> None:
    with pytest.raises(UsageError, match=f"device '{name}' is not") as caught:
        pick_device(name)
    assert "auto, cpu, cuda" in caught.value.hint


@pytest.mark.parametrize(
    ("count", "refused", "allowed"), [(0, ["cuda", "cuda:0", "cuda:99"], []), (2, ["cuda:2"], ["cuda", "cuda:1"])]
)
def test_gpus_this_machine_lacks(monkeypatch: pytest.MonkeyPatch, count: int, refused: list[str], allowed: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name in refused:
        with pytest.raises(EnvironmentFault, match=f"device '{name}': this machine has {count} usable CUDA devices") as caught:
            pick_device(name)
        assert "lpvit doctor" in caught.value.hint
    for name in allowed:
        assert pick_device(name) == torch.device(name)


def test_no_machine_has_a_hundred_gpus() -> None:
    with pytest.raises(EnvironmentFault, match="'cuda:99'"):
        pick_device("cuda:99")


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch, available: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device("auto") == torch.device(expected)
    assert pick_device("cpu") == torch.device("cpu")
    for name, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    assert pick_device("auto") == torch.device("cuda:2" if available else "cpu"), "each process has a GPU of its own"
    with pytest.raises(UsageError, match="under torchrun each process has a GPU of its own"):
        pick_device("cuda:0")


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", "cuda", torch.bfloat16),
        ("auto", "cuda:1", torch.bfloat16),
        ("auto", "cpu", torch.float32),
        ("float16", "cuda", torch.float16),
        ("float32", "cuda", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_compute_types(name: str, device: str, expected: torch.dtype) -> None:
    assert pick_dtype(name, torch.device(device)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_the_type_and_keeps_the_weights(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4)
    with autocast(torch.device("cpu"), dtype):
        assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32
