"""The shipped demo, end to end: what a user holds afterwards."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
from helpers import Demo, relative, run_cli
from PIL import Image
from safetensors import safe_open

import lpvit_cli
from lpvit_cli import Recipe, load_model
from lpvit_cli.data.transforms import transform_for
from lpvit_cli.sparse import sparse_layers
from lpvit_cli.stages import STAGES, run_of

WEIGHTS = Recipe.load("digits_vit").model.weights
DIGIT = Path(__file__).parents[2] / "examples" / "digit_3.png"


def report(demo: Demo, artefact: str) -> dict:  # type: ignore[type-arg]
    return json.loads((demo.folder / artefact / "report.json").read_text())


def test_dense_accuracy_is_that_of_the_shipped_weights(demo: Demo) -> None:
    with safe_open(WEIGHTS, "pt") as file:
        told = float(file.metadata()["top1"])
    assert report(demo, "pruned")["accuracy_dense"]["top1"] == pytest.approx(told, abs=0.01)
    assert told >= 95


def test_half_of_the_linear_weights_and_within_one_point_of_dense(demo: Demo) -> None:
    pruned, finetuned = report(demo, "pruned"), report(demo, "finetuned")
    dense = pruned["accuracy_dense"]["top1"]
    largest_block = 240 * 60 / sum(layer["shape"][0] * layer["shape"][1] for layer in pruned["layers"])
    assert 0.5 - largest_block <= pruned["linear_kept_fraction"] <= 0.5
    assert pruned["accuracy"]["top1"] >= dense - 1, "one-shot, nothing trained"
    assert finetuned["accuracy"]["top1"] >= dense - 1
    assert f"{pruned['accuracy']['top1']:.2f} %" in demo.result.out
    assert f"{finetuned['accuracy']['top1']:.2f} %" in demo.result.out


def test_on_disk_it_is_at_most_six_tenths_of_the_dense_weights(demo: Demo) -> None:
    dense = WEIGHTS.stat().st_size
    for artefact in ("pruned", "finetuned"):
        files = ("model.safetensors", "config.json")
        assert sum((demo.folder / artefact / name).stat().st_size for name in files) <= 0.6 * dense


def test_no_removed_block_came_back(demo: Demo) -> None:
    pruned, finetuned = (sparse_layers(load_model(demo.folder / name)) for name in ("pruned", "finetuned"))
    assert pruned.keys() == finetuned.keys()
    assert len(pruned) == 8
    for name in pruned:
        assert torch.equal(pruned[name].cols, finetuned[name].cols)
        assert torch.equal(pruned[name].row_ptr, finetuned[name].row_ptr)
        assert not torch.equal(pruned[name].values, finetuned[name].values), "and the kept ones did learn"


@pytest.mark.parametrize("model", ["finetuned", "export", "export/model.onnx", ""])
def test_evaluate_agrees_with_the_report(demo: Demo, model: str) -> None:
    result = run_cli("evaluate", demo.folder / model, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["accuracy"] == report(demo, "finetuned")["accuracy"]


@pytest.mark.parametrize("model", ["finetuned", "export/model.onnx"])
def test_predict_recognises_the_example(demo: Demo, model: str) -> None:
    result = run_cli("predict", demo.folder / model, DIGIT, "--json")
    assert result.code == 0, result.err
    (prediction,) = json.loads(result.out)["predictions"]
    assert (prediction["classes"][0], prediction["names"][0]) == (3, "3")
    assert len(prediction["classes"]) == 5
    assert prediction["probabilities"] == sorted(prediction["probabilities"], reverse=True)
    table = run_cli("predict", demo.folder / model, DIGIT, "--top", 1).out
    assert re.search(r"3\s+3\s+\d+\.\d %", table)


def test_the_exported_file_runs_without_lpvit(demo: Demo) -> None:
    """onnxruntime alone, with the preprocessing its metadata tells."""
    session = onnxruntime.InferenceSession(demo.folder / "export" / "model.onnx", providers=["CPUExecutionProvider"])
    config = json.loads(session.get_modelmeta().custom_metadata_map["lpvit"])
    assert config["preprocessing"]["input_size"] == [3, 32, 32]
    assert config["preprocessing"]["label_names"] == [str(digit) for digit in range(10)]
    model = load_model(demo.folder / "finetuned")
    x = transform_for(model)(Image.open(DIGIT).convert("RGB")).repeat(3, 1, 1, 1)
    (logits,) = session.run(["logits"], {"images": x.numpy()})
    with torch.inference_mode():
        assert relative(torch.from_numpy(logits), model(x)) < 1e-5


def test_the_exported_file_is_small_and_says_how_it_came_about(demo: Demo) -> None:
    exported = report(demo, "export")
    (file,) = exported["files"]
    assert (exported["precision"], file["format"], file["file"]) == ("float32", "onnx", "model.onnx")
    assert file["bytes"] == (demo.folder / "export" / "model.onnx").stat().st_size
    assert [parity["batch_size"] for parity in file["parity"]] == [1, 2, 7]
    assert file["accuracy"] == report(demo, "finetuned")["accuracy"]
    assert len(file["layers"]) == 8
    fell_back = any("all layers are dense" in note for note in exported["notes"])  # the machine was busy
    for layer in file["layers"]:
        fastest = min(layer["times_us"], key=layer["times_us"].get) if layer["times_us"] else "dense"
        assert layer["form"] == ("dense" if fell_back else fastest)
    session = onnxruntime.InferenceSession(demo.folder / "export" / "model.onnx", providers=["CPUExecutionProvider"])
    account = json.loads(session.get_modelmeta().custom_metadata_map["lpvit"])["export"]
    assert account["forms"] == {layer["name"]: layer["form"] for layer in file["layers"]}
    assert account["speedup_over_dense_float32"] == file["speed"]["speedup"]
    assert "in onnxruntime" in file["speed"]["verdict"]
    assert sorted(path.name for path in (demo.folder / "export").iterdir()) == ["model.onnx", "report.json", "stage.json"]


def test_bench_says_a_sentence_and_draws_its_pictures(demo: Demo) -> None:
    bench = report(demo, "bench")
    page = (demo.folder / "bench" / "report.html").read_text()
    for batch in bench["batches"]:
        assert re.match(
            r"batch \d+: sparse is (\d+\.\d+x (faster|slower) than|not distinguishable from) dense PyTorch", batch["verdict"]
        )
        assert batch["verdict"] in page
        assert set(batch["timing"]["subjects"]) == {"dense", "masked-dense", "sparse"}
        assert batch["energy"] is not None or batch["energy_reasons"]
    assert page.count("<svg") == 3
    assert bench["machine"]["cpu"]
    assert bench["versions"]["torch"] == torch.__version__.split("+")[0] or bench["versions"]["torch"] == torch.__version__


def test_every_artefact_tells_where_it_came_from(demo: Demo) -> None:
    run = run_of(Recipe.load(demo.folder / "recipe.yaml"), demo.folder)
    for stage in STAGES:
        record = run.record(stage)
        assert record is not None
        assert record.stage == stage.command
        assert record.inputs["versions.lpvit"] == lpvit_cli.__version__
        assert record.device
        assert record.duration_s > 0
    assert sorted(p.name for p in demo.folder.iterdir()) == sorted([".lock", "recipe.yaml", *(s.folder for s in STAGES)])


def test_run_again_skips_everything_and_prints_one_json_document(demo: Demo) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.folder.glob("*/*")}
    result = run_cli("run", "digits_vit", "-o", demo.folder, "--json", *demo.options)
    assert result.code == 0, result.err
    assert result.err.count("up to date, skipped") == 5
    document = json.loads(result.out)
    assert list(document) == [stage.command for stage in STAGES]
    assert document["prune"] == report(demo, "pruned")
    assert {path: path.stat().st_mtime_ns for path in demo.folder.glob("*/*")} == before


def test_a_dry_run_knows_what_the_stages_before_will_change(demo: Demo, tmp_path: Path) -> None:
    folder = shutil.copytree(demo.folder, tmp_path / "run")
    shutil.rmtree(folder / "finetuned")
    result = run_cli("export", "digits_vit", "-o", folder, *demo.options, "--json")
    assert result.code == 0, result.err
    again = run_cli("run", "digits_vit", "-o", folder, *demo.options, "--dry-run", "--json")
    stages = json.loads(again.out)["stages"]
    assert stages["finetune-lora-ga"] == "runs"
    assert stages["export"] == "runs again (finetune-lora-ga runs first)"


def test_what_a_stage_has_read_makes_it_stale_and_nothing_else(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*more: str) -> dict[str, str]:
        given = ("run", "digits_vit", "-o", demo.folder, *demo.options, *more, "--dry-run", "--json")
        return {name: what for name, what in json.loads(run_cli(*given).out)["stages"].items() if what != "up to date"}

    assert stale() == {}
    assert stale("--set", "export.opset=21") == {"export": "runs again (export.opset: 20 -> 21)"}
    assert stale("--set", "target.precision=bfloat16") == {"bench": "runs again (target.precision: auto -> bfloat16)"}
    assert stale("--set", "calibrate.batch_size=7") == {}, "it changes how fast a result comes, not what it is"
    assert "dtype: auto -> bfloat16" in stale("--dtype", "bfloat16")["prune"]
    monkeypatch.setattr("lpvit_cli.stages.installed", lambda package: "0.0")
    assert list(stale()) == ["export"]
    assert "versions.onnxruntime" in stale()["export"]


def test_the_type_of_export_is_that_of_its_files(demo: Demo) -> None:
    given = ("export", "digits_vit", "-o", demo.folder, *demo.options, "--dry-run", "--json")
    for dtype, what in (("auto", "up to date"), ("float16", "runs again (export.precision: None -> float16)")):
        planned = json.loads(run_cli(*given, "--dtype", dtype).out)
        assert planned["stages"]["export"].startswith(what), planned["stages"]
        assert planned["recipe"]["dtype"] == "auto"


def test_dry_run_says_which_part_changed(demo: Demo) -> None:
    result = run_cli(
        "run", "digits_vit", "-o", demo.folder, *demo.options, "--set", "prune.min_keep=0.2", "--dry-run", "--json"
    )
    assert json.loads(result.out)["stages"] == {
        "calibrate": "up to date",
        "prune": "runs again (prune.min_keep: 0.0 -> 0.2)",
        "finetune-lora-ga": "runs again (pruned: prune.min_keep: 0.0 -> 0.2)",
        "bench": "runs again (finetuned: pruned: prune.min_keep: 0.0 -> 0.2)",
        "export": "runs again (finetuned: pruned: prune.min_keep: 0.0 -> 0.2)",
    }


def test_the_run_ends_with_what_was_gained(demo: Demo) -> None:
    last = demo.result.out.strip().splitlines()[-5:]
    assert "digits_vit: top-1" in " ".join(last)
    assert "0.52x the size" in " ".join(last)
