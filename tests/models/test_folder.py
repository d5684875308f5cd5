"""Model folders: whole and damaged ones, and the permissions of their files."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import relative
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import EMPTY, FC1, KWARGS, QKV, TINY, VIT, Tensors, Trap, images, one_line, outputs, tiny
from torch import Tensor, nn

import lpvit_cli
from lpvit_cli.data.transforms import transform_for
from lpvit_cli.errors import EnvironmentFault, LpvitError, UsageError
from lpvit_cli.models.build import build_model
from lpvit_cli.models.fit import SPARE, _parameters_up_to
from lpvit_cli.models.folder import as_dense, load_model, model_config, save_model
from lpvit_cli.models.tensors import read_tensors, write_tensors
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.sparse import BlockSparseLinear, densify, sparse_layers, sparsify

Damage = Callable[[dict[str, Any], Tensors], object]


def layer(name: str, **changed: Any) -> Damage:
    return lambda config, tensors: config["sparsity"][name].update(changed)


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda config, tensors: tensors.update({name: change(tensors[name])})


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
    model.pretrained_cfg |= {"label_names": list("abcde"), "exif": True}
    save_model(tmp_path, model, model_config(section, model))
    loaded = load_model(tmp_path)
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (70, 90, 3), dtype=np.uint8))
    assert torch.equal(transform_for(loaded)(picture), transform_for(model)(picture))
    assert transform_for(loaded)(picture).shape == (3, 32, 48)
    assert loaded.pretrained_cfg["label_names"] == list("abcde")
    assert loaded.pretrained_cfg["exif"] is True


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
    """Without the checksum, as folders of lpvit 0.2: what is wrong has to be seen in the content."""
    folder = save(tmp_path_factory.mktemp("whole"), sparse_tiny())
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    return config, load_file(folder / "model.safetensors")


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


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos", "box", None])
def test_as_a_dense_model_it_keeps_its_classes_and_pixels(tmp_path: Path, interpolation: str | None) -> None:
    model: Any = tiny()
    names = ["d", "a", "c", "b", "e"]
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names, "interpolation": interpolation}
    save_model(tmp_path / "m", model, model_config(TINY, model))
    section = as_dense(tmp_path / "m", tmp_path / "w.safetensors")
    assert section.preprocess.interpolation == interpolation
    assert list(build_model(section).pretrained_cfg["label_names"]) == names
    with pytest.raises(UsageError, match="model.label_names: 2 names, the model tells 5 classes apart"):
        build_model(section.model_copy(update={"label_names": ("a", "b")}))


def test_other_threads_build_models_while_one_is_checked(tmp_path: Path) -> None:
    """Parameters of theirs count for nobody, and nothing is raised in them."""
    with ThreadPoolExecutor(1) as pool, _parameters_up_to(SPARE, tmp_path / "model.safetensors"):
        pool.submit(lambda: [nn.LayerNorm(2) for _ in range(SPARE)]).result()
        nn.LayerNorm(2)
        with pytest.raises(ValueError, match="more tensors than the 0 of"):
            [nn.LayerNorm(2) for _ in range(SPARE)]
