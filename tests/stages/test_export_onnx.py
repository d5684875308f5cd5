"""`lpvit export` on the demo's model: precisions, fall-backs, and checks that leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from helpers import Demo, copy_run, random_model, run_cli
from torch import Tensor, nn

from lpvit_cli.export import onnx_file as export_onnx
from lpvit_cli.export.layer import FormChoice
from lpvit_cli.measure.statistics import Ratio
from lpvit_cli.tasks.evaluation import Validation
from lpvit_cli.tasks.quality import ClassificationQuality


@pytest.fixture(scope="module")
def graphs() -> dict[str, bytes]:
    """What torch has written of a model, by its weights: tests write the same few models over and over."""
    return {}


@pytest.fixture(autouse=True)
def _written_once(monkeypatch: pytest.MonkeyPatch, graphs: dict[str, bytes]) -> None:
    write = export_onnx.dense_graph

    def remembered(model: nn.Module, *settings: Any) -> ir.Model:
        weights = sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())).hexdigest()
        key = f"{weights} {settings}"
        if key not in graphs:
            graphs[key] = ir.to_proto(write(model, *settings)).SerializeToString()
        return ir.from_proto(onnx.ModelProto.FromString(graphs[key]))

    monkeypatch.setattr(export_onnx, "dense_graph", remembered)


@pytest.fixture
def run(demo: Demo, tmp_path: Path) -> Any:
    """Run `lpvit export` with changes to the recipe, in a copy of the demo's run without its export."""
    folder = copy_run(demo.folder, tmp_path / "run")

    def export(*changes: str) -> Any:
        options = [option for change in changes for option in ("--set", f"export.{change}")]
        return folder, run_cli("export", "digits_vit", "-o", folder, *demo.options, *options, "--json")

    return export


@pytest.mark.parametrize(("precision", "largest"), [("int8", 0.3), ("int8-static", 0.3), ("float16", 0.55)])
def test_smaller_numbers(run: Any, monkeypatch: pytest.MonkeyPatch, precision: str, largest: float) -> None:
    monkeypatch.setattr(export_onnx, "cpu_features", lambda: {"VNNI": False})
    folder, result = run(f"precision={precision}")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    (file,) = document["files"]
    assert file["bytes"] < largest * file["bytes_dense"]
    assert file["accuracy"]["top1"] >= document["accuracy_model"]["top1"] - 1
    operators = {node.op_type for node in onnx.load(folder / "export" / "model.onnx").graph.node}
    if precision == "float16":
        assert file["speed"] is None
        assert "speed not measured" in document["notes"][0]
    else:
        assert file["speed"]["speedup"]["value"] > 0
        assert [form["name"] for form in file["speed"]["free"]] == ["dense float32 in onnxruntime", "dense int8 in onnxruntime"]
        accuracies = [document["accuracy_model"], file["accuracy"]]
        told = ["{:.2f} %".format(accuracy["top1"]) for accuracy in reversed(accuracies)]
        assert any("no VNNI" in note and f"top-1 {told[0]}, the model {told[1]}" in note for note in document["notes"])
        assert ("DynamicQuantizeLinear" in operators) == (precision == "int8")
        assert ("QuantizeLinear" in operators) == (precision == "int8-static")
        assert "MatMulIntegerToFloat" in operators


def test_bfloat16_is_checked_in_float32(run: Any) -> None:
    _, result = run("precision=bfloat16", "opset=22")
    assert result.code == 0, result.err
    assert "what was checked is the file with float32 arithmetic" in json.loads(result.out)["notes"][1]


@pytest.mark.parametrize(("mix", "dense", "kept"), [(0.9, 1.0, "dense"), (0.9, 0.6, "mix"), (1.1, None, "mix")])
def test_of_the_mix_and_all_dense_the_faster_is_kept(
    run: Any, monkeypatch: pytest.MonkeyPatch, mix: float, dense: float | None, kept: str
) -> None:
    speedups = iter([mix] if dense is None else [mix, dense])
    measure = export_onnx.measure

    def pretend(*arguments: Any) -> Any:
        return measure(*arguments).model_copy(update={"speedup": Ratio(next(speedups), 0.5, 2.0)})

    chosen = FormChoice("rows", {"rows": 1.0, "dense": 2.0})
    monkeypatch.setattr(export_onnx, "measure", pretend)
    monkeypatch.setattr(export_onnx, "choose_forms", lambda layers, *_: dict.fromkeys(layers, chosen))
    _, result = run("form=auto")
    assert next(speedups, None) is None, "dense is tried where the mix is slower, and only there"
    document = json.loads(result.out)
    (file,) = document["files"]
    assert {layer["form"] for layer in file["layers"]} == {"dense" if kept == "dense" else "rows"}
    assert file["speed"]["speedup"]["value"] == (dense if kept == "dense" else mix)
    assert any("all layers are dense" in note for note in document["notes"]) is (kept == "dense")
    assert all(layer["times_us"] for layer in file["layers"]), "what was timed stays in the report"
    assert (file["bytes"] < 0.6 * file["bytes_dense"]) == (kept == "mix"), "and that is what was written"


@pytest.mark.parametrize("form", ["dense", "rows", "chain", "batched"])
def test_a_form_can_be_asked_for(run: Any, form: str) -> None:
    _, result = run(f"form={form}")
    assert result.code == 0, result.err
    (file,) = json.loads(result.out)["files"]
    assert {layer["form"] for layer in file["layers"]} == (set() if form == "dense" else {form, "dense"})  # proj is kept whole
    assert (file["bytes"] < 0.6 * file["bytes_dense"]) == (form != "dense"), "half of the blocks are not there"


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        (["opset=99"], 2, "export.opset: 99 is newer"),
        (["opset=19"], 2, "export.opset"),
        (["precision=bfloat16"], 2, "bfloat16 needs opset 22"),
        (["tolerance=1e-12"], 4, "model.onnx disagrees with the model at batch 1"),
    ],
    ids=str,
)
def test_nothing_is_left_of_a_failure(run: Any, changes: list[str], code: int, told: str) -> None:
    folder, result = run(*changes)
    assert result.code == code
    assert told in json.loads(result.out)["error"]["message"]
    assert not [path.name for path in folder.iterdir() if "export" in path.name]


def test_a_file_that_lost_accuracy_fails(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Validation, "quality", lambda *_: ClassificationQuality(360, 90.0, 99.0))
    folder, result = run("max_drop=2")
    assert result.code == 4
    assert "model.onnx has 90.00 % top-1" in json.loads(result.out)["error"]["message"]
    assert not [path.name for path in folder.iterdir() if "export" in path.name]


def test_a_full_disk_is_told_and_leaves_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("onnx_ir.save", full)
    folder, result = run()
    assert result.code == 3
    assert "No space left on device" in json.loads(result.out)["error"]["message"]
    assert not [path.name for path in folder.iterdir() if "export" in path.name]


def test_ranges_are_means_over_images(monkeypatch: pytest.MonkeyPatch) -> None:
    class Calibration(list[tuple[Tensor, None]]):
        images = 5

    model = random_model("swin")
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    linears: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    source: Any = SimpleNamespace(model=model, calibration=lambda: Calibration([(x[:3], None), (x[3:], None)]))
    ranges = export_onnx._input_ranges(source, linears, lambda *_: None)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in linears}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, given, name=name: seen[name].append((given[0].min(), given[0].max())))
    with torch.inference_mode():
        for image in x:
            model(image[None])
    for name, found in seen.items():
        assert ranges[name] == pytest.approx(torch.tensor(found).mean(dim=0).tolist(), rel=1e-5)
