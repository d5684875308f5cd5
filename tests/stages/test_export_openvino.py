"""The openvino format: only where OpenVINO is installed (pip install 'lpvit[openvino]')."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import Demo, copy_run, run_cli

from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.targets.openvino import OpenVinoModel

DIGIT = Path(__file__).parents[2] / "examples" / "digit_3.png"


def test_the_converted_file_agrees_and_stands_alone(demo: Demo, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    folder = copy_run(demo.folder, tmp_path / "run")
    result = run_cli("export", "digits_vit", "-o", folder, *demo.options, "--format", "openvino", "--json")
    assert result.code == 0, result.err
    onnx_file, file = json.loads(result.out)["files"]
    assert (onnx_file["format"], file["format"], file["file"]) == ("onnx", "openvino", "model.xml")
    assert file["accuracy"] == onnx_file["accuracy"]
    assert file["bytes"] < 0.7 * onnx_file["bytes_dense"]
    assert "in OpenVINO" in file["speed"]["verdict"]
    names = {form["name"] for form in file["speed"]["free"]}
    assert names == {f"dense {form}" for form in ("float32 in OpenVINO", "float32 in onnxruntime", "int8 in onnxruntime")}
    assert file["speed"]["free"][0]["name"] == "dense float32 in OpenVINO", "what `speedup` is over"
    assert names == {form["name"] for form in onnx_file["speed"]["free"]}
    predicted = run_cli("predict", folder / "export" / "model.xml", DIGIT, "--json")
    assert json.loads(predicted.out)["predictions"][0]["classes"][0] == 3, predicted.err
    evaluated = run_cli("evaluate", folder / "export" / "model.xml", "--json")
    assert json.loads(evaluated.out)["accuracy"] == file["accuracy"]
    (tmp_path / "text.xml").write_text("<no model>")
    with pytest.raises(EnvironmentFault, match="openvino cannot load it"):
        OpenVinoModel(tmp_path / "text.xml")


def test_without_openvino_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find_spec(name))
    (tmp_path / "model.xml").write_text("")
    with pytest.raises(EnvironmentFault, match="'openvino' is not installed") as caught:
        OpenVinoModel(tmp_path / "model.xml")
    assert caught.value.hint == "pip install openvino"
