"""The exported file against the model, in onnxruntime; files that are none; results that fail the check."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from helpers import relative
from torch import nn

from lpvit_cli.errors import CheckFailed, EnvironmentFault
from lpvit_cli.export.onnx import export_onnx
from lpvit_cli.export.parity import agreement, relative_error
from lpvit_cli.export.runtime import OnnxModel
from lpvit_cli.report.schema import Parity
from lpvit_cli.sparse import densify, sparsify
from lpvit_cli.stages.export import first_images, require_parity

CONFIG = {"num_classes": 5, "preprocessing": {"input_size": [3, 32, 32]}, "architecture": "a"}


@pytest.fixture
def exported(tiny_vit: nn.Module, tmp_path: Path) -> tuple[nn.Module, Path]:
    sparsify(tiny_vit, {"blocks.0.mlp.fc1": torch.rand(16, 2, generator=torch.Generator().manual_seed(0)) < 0.5}, (8, 16))
    export_onnx(densify(tiny_vit), tmp_path / "model.onnx", 20, CONFIG)
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


@pytest.mark.parametrize(
    "wrong", [{"relative_error": 2e-3}, {"agreement": 0.5}, {"relative_error": float("nan")}], ids=lambda wrong: str(wrong)
)
def test_a_file_that_disagrees_fails_the_check(wrong: dict[str, float]) -> None:
    good = Parity(batch_size=1, relative_error=1e-7, agreement=1.0)
    require_parity([good], 1e-3)
    with pytest.raises(CheckFailed, match="disagrees with the model at batch 2") as caught:
        require_parity([good, good.model_copy(update={"batch_size": 2, **wrong})], 1e-3)
    assert caught.value.exit_code == 4


def test_files_lpvit_did_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = onnx.helper.make_node("Identity", ["images"], ["logits"])
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("images", "logits")]
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:])
    foreign = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(EnvironmentFault, match="was not exported by lpvit"):
        OnnxModel(tmp_path / "foreign.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(EnvironmentFault, match="onnxruntime cannot load it"):
        OnnxModel(tmp_path / "text.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="'onnxruntime' is not installed") as caught:
        OnnxModel(tmp_path / "text.onnx")
    assert caught.value.hint == "pip install onnxruntime"


def test_first_images_repeat_a_short_split() -> None:
    batches = [(torch.full((2, 1, 1, 1), 1.0), None), (torch.full((1, 1, 1, 1), 2.0), None)]
    assert first_images(batches, 2).flatten().tolist() == [1, 1]
    assert first_images(batches, 7).flatten().tolist() == [1, 1, 2, 1, 1, 2, 1]
