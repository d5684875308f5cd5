"""Torch's own formats: against the model in float64, in a torch without lpvit; files that are none, or are hostile."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from helpers import Result, masked, random_model, relative
from lpvit_kernels import BlockSparseMatrix
from torch import nn

from lpvit_cli import Recipe
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.export import program_file
from lpvit_cli.export.formats.aoti import FILE as COMPILED
from lpvit_cli.export.formats.aoti import Aoti
from lpvit_cli.export.formats.pt2 import FILE, Pt2
from lpvit_cli.export.layer import ExportLayer
from lpvit_cli.export.opening import open_model
from lpvit_cli.export.program import FORMS, as_module, export_program, plain
from lpvit_cli.export.source import Source
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.recipe.export import ExportSection
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.sparse import densify, sparse_layers, sparsify
from lpvit_cli.targets.pt2 import EXTRA_FILE, TorchProgram
from lpvit_cli.tasks.classification import Classification
from lpvit_cli.tasks.evaluation import Validation
from lpvit_cli.tasks.quality import ClassificationQuality

PREPROCESSING = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
CONFIG: dict[str, Any] = {"num_classes": 5, "preprocessing": PREPROCESSING, "data": {"dataset": "digits", "split": "test"}}


class Images(list[tuple[torch.Tensor, torch.Tensor]]):
    """Validation batches."""

    images = share = 10

    def some(self, count: int) -> Images:
        return self


def pruned(which: str = "vit", block: tuple[int, int] = (8, 16)) -> VisionModel:
    """A random model with block-sparse layers; one block row of each keeps nothing."""
    model = random_model(which)
    layers = prunable_layers(model, Layers())
    masks = {name: masked(layer.weight.shape, block, 0.5, seed=7)[1] for name, layer in layers.items()}
    for mask in masks.values():
        mask[1] = False
    sparsify(model, masks, block)
    return model  # type: ignore[return-value]


def source_of(model: VisionModel, form: str = "auto") -> Source:
    images = Images(
        [(torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.zeros(10, dtype=torch.long))]
    )
    judge = Validation(images, torch.device("cpu"), torch.float32, lambda *told: None, Classification())  # type: ignore[arg-type]
    facts: dict[str, Any] = {"original": model, "model": model, "validation": judge, "quality": ClassificationQuality(10, 0, 0)}
    facts["quality_dense"] = facts["quality"]
    nobody: Any = None
    return Source(
        name="test",
        settings=ExportSection(form=form),  # type: ignore[arg-type]
        precision="float32",
        threads=1,
        asked_threads=1,
        batch_size=1,
        folder=Path(),
        config=CONFIG,
        prunable=nobody,
        calibration=nobody,
        dense=partial(random_model, "vit"),
        trained=nobody,
        publication=nobody,
        **facts,
    )


def saved(model: VisionModel, folder: Path, form: str = "rows", config: Any = CONFIG) -> Path:
    layers = {name: ExportLayer(name, layer.weight, layer.bias) for name, layer in sparse_layers(model).items()}
    program = export_program(plain(model, layers, dict.fromkeys(layers, form)))
    torch.export.save(program, folder / FILE, extra_files={EXTRA_FILE: json.dumps(config)})
    return folder / FILE


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionModel, Path]:
    model = pruned()
    return model, saved(model, tmp_path_factory.mktemp("pt2"))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "block", "density"),
    [((64, 48), (16, 8), 0.4), ((50, 43), (16, 8), 0.4), ((7, 5), (8, 16), 1.0), ((64, 48), (16, 8), 0.0)],
    ids=["whole", "ragged", "smaller than a block", "all gone"],
)
def test_a_layer_in_each_form(shape: tuple[int, int], block: tuple[int, int], density: float, form: str, bias: bool) -> None:
    weight, mask = masked(shape, block, density)
    matrix = BlockSparseMatrix.from_dense(weight, block, mask)
    offset = torch.randn(shape[0]) if bias else None
    x = torch.randn(2, 3, shape[1])
    expected = x.double() @ matrix.to_dense().double().T + (0 if offset is None else offset.double())
    y = as_module(ExportLayer("l", matrix, offset), form)(x)
    assert y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["vit", "vit without a qkv bias", "swin"])
@pytest.mark.parametrize("block", [(8, 16), (24, 20)], ids=["whole blocks", "ragged blocks"])
def test_any_batch_gives_the_models_logits(which: str, block: tuple[int, int], tmp_path: Path) -> None:
    model = pruned(which, block)
    program, reference = TorchProgram(saved(model, tmp_path)), densify(model).double()
    assert program.num_classes == 5
    assert program.pretrained_cfg == PREPROCESSING
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 32, 32)
        with torch.inference_mode():
            assert relative(program.eval()(x), reference(x.double())) < 1e-5


def test_the_file_runs_in_torch_without_lpvit(written: tuple[VisionModel, Path], tmp_path: Path) -> None:
    model, path = written
    x = torch.randn(3, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    script = f"""
import sys
for module in ("lpvit_cli", "lpvit_kernels", "timm", "onnx", "onnxruntime"):
    sys.modules[module] = None  # importing it now fails
import json, torch
extra = {{"{EXTRA_FILE}": ""}}
program = torch.export.load({str(path)!r}, extra_files=extra)
assert json.loads(extra["{EXTRA_FILE}"])["num_classes"] == 5
torch.save(program.module()(torch.load("x.pt")), "y.pt")
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    y = torch.load(tmp_path / "y.pt")
    assert not y.requires_grad
    with torch.inference_mode():
        assert relative(y, model(x)) < 1e-5


def test_what_export_writes(tmp_path: Path) -> None:
    model = pruned()
    file = Pt2().write(source_of(model, form="rows"), tmp_path, lambda *_: None)
    assert file.bytes == (tmp_path / FILE).stat().st_size
    assert [parity.batch_size for parity in file.parity] == [1, 2, 7]
    assert {layer.name for layer in file.layers} == set(sparse_layers(model))
    assert {layer.form for layer in file.layers} == {"rows"}
    assert file.quality is not None
    assert file.quality.images == 10
    assert file.speed is not None
    opened, data = open_model(str(tmp_path / FILE))
    assert isinstance(opened, TorchProgram)
    assert data == CONFIG["data"]


def test_forms_are_timed_and_a_full_layer_is_dense() -> None:
    model = pruned()
    matrix = BlockSparseMatrix.from_dense(torch.randn(128, 32), (8, 16))
    layers = {name: ExportLayer(name, layer.weight, layer.bias) for name, layer in sparse_layers(model).items()}
    layers["blocks.0.mlp.fc1"] = replace(layers["blocks.0.mlp.fc1"], weight=matrix)
    chosen = program_file._choose(source_of(model), layers, lambda *_: None)
    assert chosen.pop("blocks.0.mlp.fc1").times_us == {}
    for choice in chosen.values():
        assert set(choice.times_us) == set(FORMS)
        assert choice.form == min(choice.times_us, key=choice.times_us.__getitem__)
    for form, expected in (("dense", "dense"), ("rows", "rows"), ("batched", "rows")):
        made = program_file._choose(source_of(model, form=form), layers, lambda *_: None)
        assert made.pop("blocks.0.mlp.fc1").form == "dense"
        assert {choice.form for choice in made.values()} == {expected}


@pytest.mark.parametrize("format_", ["pt2", "aoti"])
def test_other_precisions_are_refused(format_: str) -> None:
    from lpvit_cli.stages.export import run_stage

    recipe = Recipe.load("digits_vit", [f"export.formats=[onnx,{format_}]", "export.precision=int8"])
    with pytest.raises(UsageError, match="is written in float32 only, not in int8"):
        run_stage(recipe, None, Path(), lambda *_: None)  # type: ignore[arg-type]


def test_a_program_does_not_tell_where_it_was_made(written: tuple[VisionModel, Path]) -> None:
    with zipfile.ZipFile(written[1]) as file:
        assert [name for name in file.namelist() if b".py" in file.read(name)] == []


def test_files_that_are_none(written: tuple[VisionModel, Path], tmp_path: Path, lpvit: Callable[..., Result]) -> None:
    text, cut, flipped, foreign = (tmp_path / f"{name}.pt2" for name in ("text", "cut", "flipped", "foreign"))
    text.write_text("no model")
    whole = written[1].read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[len(whole) // 8] ^= 255
    flipped.write_bytes(damaged)
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), foreign)
    for path, message in (
        (text, "not a readable .pt2 file"),
        (cut, "not a readable .pt2 file"),
        (flipped, "damaged: .* does not fit its checksum"),
        (foreign, "was not written by lpvit"),
    ):
        with pytest.raises(EnvironmentFault, match=message) as caught:
            TorchProgram(path)
        assert str(path) in caught.value.message
        assert caught.value.hint
    result = lpvit("evaluate", foreign)
    assert result.code == 3
    assert "was not written by lpvit" in result.err
    missing = lpvit("predict", tmp_path / "none.pt2", "image.png")
    assert missing.code == 2
    assert "no such model" in missing.err


def test_metadata_that_do_not_suffice(tmp_path: Path) -> None:
    model = pruned()
    less = {key: value for key, value in PREPROCESSING.items() if key != "mean"}
    with pytest.raises(EnvironmentFault, match="do not say how to use it: no mean"):
        TorchProgram(saved(model, tmp_path, "dense", {**CONFIG, "preprocessing": less}))
    with pytest.raises(EnvironmentFault, match="its metadata are unreadable|no input_size"):
        TorchProgram(saved(model, tmp_path, "dense", []))


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return Path.write_text, (self.target, "boom")


def edited(path: Path, made: Path, edits: dict[str, Callable[[bytes], bytes]]) -> Path:
    """A copy of a .pt2 file with other content in some of its parts, its checksums right."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        names = {name.partition("/")[2]: name for name in old.namelist()}
        folder = old.namelist()[0].partition("/")[0]
        for part in {**names, **edits}:
            content = old.read(names[part]) if part in names else b""
            new.writestr(f"{folder}/{part}", edits.get(part, bytes)(content))
    return made


def in_json(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        document = json.loads(content)
        change(document)
        return json.dumps(document).encode()

    return edit


def test_a_file_that_would_run_code_is_refused(written: tuple[VisionModel, Path], tmp_path: Path) -> None:
    model, path = written
    bomb, target = tmp_path / "bomb", tmp_path / "boom"
    torch.save(Bomb(target), bomb)
    weights = "data/weights/model_weights_config.json"

    def pickled(document: Any) -> None:
        next(iter(document["config"].values()))["use_pickle"] = True

    def opaque(document: Any) -> None:
        payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        document["config"]["x"] = payload

    def first_node(document: Any) -> Any:
        return document["graph_module"]["graph"]["nodes"][0]

    hostile: dict[str, dict[str, Callable[[bytes], bytes]]] = {
        "sample inputs hold more": {"data/sample_inputs/model.pt": lambda _: bomb.read_bytes()},
        "is pickled": {weights: in_json(pickled)},
        "x is pickled": {"data/constants/model_constants_config.json": in_json(opaque)},
        r"holds 'data/constants/opaque_obj_0'": {"data/constants/opaque_obj_0": lambda _: pickle.dumps(Bomb(target))},
        r"holds 'data/weights/model.pt'": {"data/weights/model.pt": lambda _: bomb.read_bytes()},
        "calls 'torch.load'": {"models/model.json": in_json(lambda d: first_node(d).update(target="torch.load"))},
        "has the size": {
            "models/model.json": lambda content: content.replace(b"Symbol('", b"__import__('os').getpid() * Symbol('")
        },
        "holds Python code": {"models/model.json": in_json(lambda d: d.update(guards_code=["print(1)"]))},
    }
    for number, (message, edits) in enumerate(hostile.items()):
        with pytest.raises(EnvironmentFault, match=message):
            TorchProgram(edited(path, tmp_path / f"hostile{number}.pt2", edits))
    assert not target.exists()
    x = torch.randn(1, 3, 32, 32)
    assert relative(TorchProgram(edited(path, tmp_path / "same.pt2", {}))(x), model(x)) < 1e-5, "the copying does no harm"


def test_without_a_compiler() -> None:
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(EnvironmentFault, match="there is no C\\+\\+ compiler here") as caught:
        Aoti().require()
    assert "g++" in caught.value.hint


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    try:
        Aoti().require()
    except EnvironmentFault as error:
        pytest.skip(error.message)
    model = pruned()
    file = Aoti().write(source_of(model, form="rows"), tmp_path, lambda *_: None)
    assert (file.file, file.format) == (COMPILED, "aoti")
    program, data = open_model(str(tmp_path / COMPILED))
    assert data == CONFIG["data"]
    assert program.pretrained_cfg == PREPROCESSING
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 32, 32)
        with torch.inference_mode():
            assert relative(program.eval()(x), densify(model).double()(x.double())) < 1e-5
    assert torch.equal(program(x.to(memory_format=torch.channels_last)), program(x))
