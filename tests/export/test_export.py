"""The exported file against the model, in onnxruntime; files that are none; results that fail the check."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import relative
from PIL import Image
from torch import nn

from lpvit_cli.data.batches import Batches
from lpvit_cli.errors import CheckFailed, EnvironmentFault, UsageError
from lpvit_cli.export import graph as onnx_export
from lpvit_cli.export.check import agreement, real_images, relative_error, require_parity, same_top1
from lpvit_cli.export.graph import as_float32, dense_graph, save_onnx
from lpvit_cli.export.results import Parity
from lpvit_cli.sparse import densify, sparsify
from lpvit_cli.targets.onnxruntime import OnnxModel

PREPROCESSING = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
CONFIG = {"num_classes": 5, "preprocessing": PREPROCESSING, "architecture": "a"}


@pytest.fixture
def exported(tiny_vit: nn.Module, tmp_path: Path) -> tuple[nn.Module, Path]:
    sparsify(tiny_vit, {"blocks.0.mlp.fc1": torch.rand(16, 2, generator=torch.Generator().manual_seed(0)) < 0.5}, (8, 16))
    save_onnx(dense_graph(densify(tiny_vit), 20), tmp_path / "model.onnx", CONFIG)
    return tiny_vit, tmp_path / "model.onnx"


def test_any_batch_gives_the_models_logits(exported: tuple[nn.Module, Path]) -> None:
    model, path = exported
    runtime = OnnxModel(path)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 32, 32)
        with torch.inference_mode():
            assert relative(runtime(x), model.double()(x.double())) < 1e-4
        model.float()


def test_the_file_stands_alone_and_uses_the_operators_of_its_opset(exported: tuple[nn.Module, Path]) -> None:
    _, path = exported
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert json.loads({p.key: p.value for p in graph.metadata_props}["lpvit"]) == CONFIG
    assert next(o.version for o in graph.opset_import if o.domain == "") == 20
    operators = {node.op_type for node in graph.graph.node}
    assert {"Gelu", "LayerNormalization"} <= operators
    batch = graph.graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param, "the batch is a name, not a number"
    assert {p.key for node in graph.graph.node for p in node.metadata_props} <= {"pkg.torch.onnx.name_scopes"}
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes(), "no path of this machine"
    runtime = OnnxModel(path)
    assert runtime.num_classes == 5
    assert runtime.pretrained_cfg == CONFIG["preprocessing"]


def test_relative_error_and_agreement() -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert relative_error(reference * 1.01, reference) == pytest.approx(0.01)
    flipped = torch.tensor([[5.0, 4.0], [0.0, 1.0]])
    assert agreement(reference, reference, 1e-3) == 1
    assert agreement(flipped, reference, 1e-3) == 0.5
    tie = torch.tensor([[1.0, 1.0 + 1e-6]])
    assert agreement(tie.flip(1), tie, 1e-3) == 1, "either of two equal classes is right"
    assert same_top1(tie.flip(1), tie) == 0, "but it is not the same one"
    assert same_top1(flipped, reference) == 0.5


@pytest.mark.parametrize(
    "wrong", [{"relative_error": 2e-3}, {"agreement_but_ties": 0.5}, {"relative_error": float("nan")}], ids=str
)
def test_a_file_that_disagrees_fails_the_check(wrong: dict[str, float]) -> None:
    good = Parity(batch_size=2, relative_error=1e-7, agreement=0.5, agreement_but_ties=1.0)
    require_parity(good, 1e-3, "model.onnx")
    with pytest.raises(CheckFailed, match="model.onnx disagrees with the model at batch 2"):
        require_parity(good.model_copy(update=wrong), 1e-3, "model.onnx")


def foreign(path: Path, metadata: dict[str, Any], sides: tuple[Any, ...] = ("n", 3, 32, 32)) -> Path:
    """A file of another origin: the mean over an image's sides is its logits."""
    info = onnx.helper.make_tensor_value_info
    floats = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("GlobalAveragePool", ["pixels"], ["means"])
    flat = onnx.helper.make_node("Flatten", ["means"], ["scores"])
    graph = onnx.helper.make_graph([node, flat], "g", [info("pixels", floats, sides)], [info("scores", floats, ["n", 3])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("metadata", [{"pretrained_cfg": PREPROCESSING}, {"lpvit": {"preprocessing": PREPROCESSING}}], ids=str)
def test_a_foreign_file_runs_if_its_metadata_suffice(tmp_path: Path, metadata: dict[str, Any]) -> None:
    model = OnnxModel(foreign(tmp_path / "foreign.onnx", metadata))
    assert (model.num_classes, model.pretrained_cfg) == (3, PREPROCESSING)
    x = torch.randn(2, 3, 32, 32)
    assert relative(model(x), x.mean(dim=(2, 3))) < 1e-5


@pytest.mark.parametrize(
    ("metadata", "sides", "told"),
    [
        ({}, ("n", 3, 32, 32), "do not say how to use it: no input_size, mean, std, interpolation, crop_pct"),
        ({"pretrained_cfg": {**PREPROCESSING, "mean": None} | {"x": 1}}, ("n", 3, 48, 48), "takes images of [3, 48, 48]"),
        ({"pretrained_cfg": {k: v for k, v in PREPROCESSING.items() if k != "std"}}, ("n", 3, 32, 32), "no std"),
        ({"lpvit": [1]}, ("n", 3, 32, 32), "unreadable"),
        ({"lpvit": {"preprocessing": 7}}, ("n", 3, 32, 32), "unreadable"),
    ],
    ids=str,
)
def test_else_it_says_what_is_missing(tmp_path: Path, metadata: dict[str, Any], sides: tuple[Any, ...], told: str) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        OnnxModel(foreign(tmp_path / "foreign.onnx", metadata, sides))
    assert told in caught.value.message
    assert caught.value.hint


def test_files_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(EnvironmentFault, match="onnxruntime cannot load it"):
        OnnxModel(tmp_path / "text.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="'onnxruntime' is not installed") as caught:
        OnnxModel(tmp_path / "text.onnx")
    assert caught.value.hint == "pip install onnxruntime"


def test_large_weights_lie_beside_the_graph(tiny_vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "INLINE_BYTES", 1000)
    (tmp_path / "made").mkdir()
    save_onnx(dense_graph(tiny_vit, 20), tmp_path / "made" / "model.onnx", CONFIG)
    (tmp_path / "made").rename(tmp_path / "moved")
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["model.onnx", "model.onnx.data"]
    weights = sum(parameter.numel() * 4 for parameter in tiny_vit.parameters() if parameter.numel() > 1000)
    assert (tmp_path / "moved" / "model.onnx.data").stat().st_size >= weights
    x = torch.randn(2, 3, 32, 32)
    assert relative(OnnxModel(tmp_path / "moved" / "model.onnx")(x), tiny_vit(x)) < 1e-5


@pytest.mark.parametrize(
    ("opset", "precision", "told"),
    [(20, "bfloat16", "bfloat16 needs opset 22"), (99, "float32", "99 is newer than the installed onnx knows")],
)
def test_opsets_that_cannot_be_written(tiny_vit: nn.Module, opset: int, precision: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        dense_graph(tiny_vit, opset, precision)


@pytest.mark.parametrize(("precision", "unit"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_is_typed_inside_and_float32_outside(
    tiny_vit: nn.Module, tmp_path: Path, precision: str, unit: float
) -> None:
    x = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        reference = tiny_vit(x)
    graph = dense_graph(copy.deepcopy(tiny_vit), 22, precision)
    save_onnx(graph, tmp_path / "half.onnx", CONFIG)
    written = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "half.onnx"))
    kinds = {tensor.data_type for tensor in written.graph.initializer if tensor.dims and len(tensor.dims) > 1}
    assert kinds == {getattr(onnx.TensorProto, precision.upper())}
    ends = [value.type.tensor_type.elem_type for value in (*written.graph.input, *written.graph.output)]
    assert ends == [onnx.TensorProto.FLOAT] * 2
    as_float32(graph)  # the rounded weights, unrounded arithmetic
    save_onnx(graph, tmp_path / "as_float32.onnx", CONFIG)
    assert unit / 100 < relative(OnnxModel(tmp_path / "as_float32.onnx")(x), reference) < 20 * unit
    if precision == "float16":
        assert relative(OnnxModel(tmp_path / "half.onnx")(x), reference) < 20 * unit


class Levels:
    """Ten images of one pixel, of grey 0 to 9; the first cannot be read."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 0:
            raise OSError("broken")
        return Image.new("L", (1, 1), index), 0

    def __len__(self) -> int:
        return 10

    def filename(self, index: int) -> str:
        return str(index)


def test_files_are_checked_on_a_random_choice_of_images() -> None:
    """Which is fixed, holds the readable ones only, and is repeated where the split is short."""
    batches = Batches(Levels(), lambda image: torch.full((1, 1, 1), float(image.getpixel((0, 0)))), batch_size=4, channels=1)
    chosen = np.sort(np.random.RandomState(0).permutation(10)[:3]).tolist()
    assert chosen != [0, 1, 2]
    assert real_images(batches, 3).flatten().tolist() == chosen
    assert real_images(batches, 21).flatten().tolist() == [*range(1, 10), *range(1, 10), 1, 2, 3]
    assert batches.skipped == []
