"""What bench compares: each kind of subject, what it reports of them, and what cannot run here."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Result, run_cli

from lpvit_cli import load_model
from lpvit_cli.bench import subjects
from lpvit_cli.bench.session import OUT_OF_MEMORY, Bench
from lpvit_cli.bench.subjects import Shelf
from lpvit_cli.measure.timing import Timing, TimingRun
from lpvit_cli.models.build import build_model
from lpvit_cli.models.folder import model_config, save_model
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.report.schema import BenchReport
from lpvit_cli.stages import bench as stage

QUICK = {
    "calibrate.images": 64,
    "prune.method": "magnitude",
    "prune.sequential": "false",
    "prune.reweigh": 0,
    "finetune": "null",
    "bench.rounds": 6,
    "bench.warmup_seconds": 0,
    "bench.batch_sizes": "[2]",
    "export.form": "rows",
}


def options(**changes: object) -> list[str]:
    keys = QUICK | {key.replace("__", "."): value for key, value in changes.items()}
    return [option for key, value in keys.items() for option in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo's model, pruned by magnitude and exported."""
    folder = tmp_path_factory.mktemp("run") / "quick"
    for command in ("calibrate", "prune", "export"):
        result = run_cli(command, "digits_vit", "-o", folder, *options())
        assert result.code == 0, result.err
    return folder


def bench(folder: Path, *more: object, **changes: object) -> Result:
    return run_cli("bench", "digits_vit", "-o", folder, *options(**changes), *more)


def report(folder: Path) -> BenchReport:
    return BenchReport.model_validate_json((folder / "bench" / "report.json").read_text())


def test_subjects_of_both_runtimes_are_compared_with_the_fastest_dense_one(pruned: Path) -> None:
    names = ["dense", "dense-onnx", "dense-onnx-int8", "masked-dense", "sparse", "onnx"]
    result = bench(pruned, "--layers", bench__subjects=f"[{','.join(names)}]")
    assert result.code == 0, result.err
    (batch,) = report(pruned).batches
    assert list(batch.timing.subjects) == names
    medians = {name: timed.median_ms for name, timed in batch.timing.subjects.items()}
    p50 = {name: timed.percentiles.p50 for name, timed in batch.timing.subjects.items() if timed.percentiles}
    assert list(p50) == names, "a model's calls are long enough to be timed one by one"
    assert batch.baseline == min(names[:3], key=lambda name: medians[name])
    assert batch.subject == min(("sparse", "onnx"), key=lambda name: medians[name])
    assert set(batch.speedup) == set(names) - {batch.baseline}
    labels = dict(zip(names, ("dense PyTorch", "dense onnxruntime", "dense onnxruntime in int8"), strict=False))
    assert f"{batch.subject} is" in batch.verdict
    assert f" {labels[batch.baseline]} (" in batch.verdict
    assert all(len(timed.samples_ms) == 6 for timed in batch.timing.subjects.values())
    whole = sum(tensor.nbytes for tensor in load_model(pruned / "pruned").state_dict().values())
    assert all(held is not None and held > whole for held in batch.peak_memory_bytes.values())

    rows = list(csv.DictReader((pruned / "bench" / "report.csv").open()))
    assert [row["subject"] for row in rows] == names
    for row in rows:
        assert float(row["median_ms"]) == medians[row["subject"]]
        assert float(row["p50_ms"]) == p50[row["subject"]]
        assert float(row["images_per_second"]) == 1000 * batch.batch_size / medians[row["subject"]]
        assert float(row["peak_memory_bytes"]) == batch.peak_memory_bytes[row["subject"]]
        assert row["joules_per_image"] == "", "not measured is empty, not zero"
        ratio = batch.speedup.get(row["subject"])
        assert row["speedup_low"] == (str(ratio.low) if ratio else "")

    layers = batch.layers
    assert layers is not None
    sparse = load_model(pruned / "pruned")
    assert len(layers.layers) == 9
    assert sum(layer.share for layer in layers.layers) + layers.rest_share == pytest.approx(1)
    for layer in layers.layers:
        weight = sparse.get_submodule(layer.name).weight
        values = weight.values if layer.block else weight
        assert layer.rows == (2 if layer.name == "head" else 2 * 17)
        if layer.shape == tuple(weight.shape):  # nothing was cut out
            assert layer.tflops * 1e9 * layer.ms == pytest.approx(2 * layer.rows * values.numel())
        assert layer.roofline * layer.ms > 0
        assert (layer.runs == "linear") is (layer.block is None)


@pytest.mark.parametrize(
    ("times", "label"),
    [
        ({"dense-onnx": 3.0, "dense-onnx-int8": 2.0, "onnx": 1.0}, "dense onnxruntime in int8"),
        ({"dense": 3.0, "dense-compiled": 2.0, "sparse": 1.0}, "compiled dense PyTorch"),
    ],
)
def test_the_verdict_names_the_fastest_dense_one(
    pruned: Path, monkeypatch: pytest.MonkeyPatch, times: dict[str, float], label: str
) -> None:
    timings = {name: Timing([ms] * 12, None, ms, 0.0, 1, None, False) for name, ms in times.items()}

    def pretend(self: Bench, opened: object, shelf: Shelf, what: str) -> TimingRun:
        assert list(shelf.openers) == list(times)
        return TimingRun(timings, threads=1, foreign_load=0.0)

    monkeypatch.setattr(Bench, "_time", pretend)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    assert bench(pruned, "--no-resume", bench__subjects=f"[{','.join(times)}]").code == 0
    found = report(pruned)
    assert f" is 2.00x faster than {label} (" in found.batches[0].verdict
    assert any("lpvit export measures" in note for note in found.notes) == ("int8" in label)


def test_onnxruntime_is_compared_with_what_is_free() -> None:
    recipe = Recipe.load("digits_vit", ["target.runtime=onnxruntime"])
    assert recipe.subjects == ("dense-onnx", "dense-onnx-int8", "onnx")


def test_dtypes_and_batches_are_lists(pruned: Path) -> None:
    result = bench(pruned, "--dtype", "bfloat16", bench__batch_sizes="[1,3]")
    assert result.code == 0, result.err
    assert [(batch.dtype, batch.batch_size) for batch in report(pruned).batches] == [("bfloat16", 1), ("bfloat16", 3)]
    result = bench(pruned, bench__dtypes="[bfloat16,float32]", bench__batch_sizes="[3]")
    found = report(pruned)
    assert [batch.dtype for batch in found.batches] == ["bfloat16", "float32"]
    assert all(batch.verdict.startswith(f"batch 3, {batch.dtype}: sparse") for batch in found.batches)
    assert "pruned on" in result.out
    half, full = ([batch.peak_memory_bytes["dense"] for batch in found.batches][k] for k in (0, 1))
    assert half is not None
    assert full is not None
    assert half < full, "weights of half the size"


def test_a_baseline_is_what_all_ratios_are_against(pruned: Path, tmp_path: Path) -> None:
    other = shutil.copytree(pruned, tmp_path / "other")
    for baseline in (other, other / "export" / "model.onnx"):
        result = bench(pruned, "--baseline", baseline, bench__subjects="[sparse]")
        assert result.code == 0, result.err
        (batch,) = report(pruned).batches
        assert (batch.baseline, list(batch.speedup)) == ("baseline", ["sparse"])
        assert f" {baseline.parent.name}/{baseline.name} " in batch.verdict
        assert str(tmp_path) not in batch.model_dump_json(), "a report may be published"
    again = bench(pruned, "--baseline", baseline, bench__subjects="[sparse]")
    assert "up to date" in again.err
    (other / "export" / "model.onnx").write_bytes(b"not what it was")
    assert bench(pruned, "--baseline", baseline, bench__subjects="[sparse]").code == 3


@pytest.mark.parametrize(
    ("more", "changes", "code", "says"),
    [
        (["--device", "cuda:7"], {}, 3, "this machine has"),
        (["--device", "tpu"], {}, 2, "not a torch device"),
        ([], {"bench__subjects": "[dense,dense-graph,sparse]"}, 3, "dense-graph: CUDA graphs need a GPU, this device is cpu"),
        ([], {"bench__subjects": "[dense,sparse,onnx]", "bench__dtypes": "[bfloat16]"}, 2, "onnx: onnxruntime runs in float32"),
        ([], {"bench__subjects": "[dense,masked-dense]"}, 2, "needs a pruned one"),
        ([], {"bench__subjects": "[sparse]"}, 2, "needs a dense one to compare with, or a baseline"),
        ([], {"bench__subjects": "[dense,sprase]"}, 2, "given: sprase"),
        (["--baseline", "nowhere/run"], {}, 2, "no such model folder or file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_run_here_is_said_before_anything_is_measured(
    pruned: Path, more: list[str], changes: dict[str, str], code: int, says: str
) -> None:
    result = bench(pruned, *more, **changes)
    assert (result.code, says in result.err) == (code, True), result.err
    assert "timing" not in result.err
    assert "Traceback" not in result.err


def test_a_missing_onnx_file_names_the_command_that_makes_it(pruned: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pruned, tmp_path / "run")
    shutil.rmtree(folder / "export")
    result = bench(folder, bench__subjects="[dense,sparse,onnx]")
    assert (result.code, f"run: lpvit export digits_vit --output {folder}" in result.err) == (2, True), result.err


def test_a_device_that_is_not_there_is_told_before_what_is_missing(tmp_path: Path) -> None:
    assert bench(tmp_path / "new", "--device", "cuda:7").code == 3


def test_a_model_folder_of_another_architecture_is_refused(pruned: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pruned, tmp_path / "run")
    path = folder / "pruned" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"kwargs": config["kwargs"] | {"depth": 1}}))
    result = bench(folder)
    assert (result.code, "'depth': 1" in result.err, "lpvit run RECIPE" in result.err) == (2, True, True), result.err


def test_energy_that_is_required_and_not_to_be_had_is_exit_code_3_and_the_times_are_kept(
    pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lpvit_cli.measure.energy import run as energy
    from lpvit_cli.measure.energy.meters.base import MeterError, Reading

    reasons = ["no meter here"]
    monkeypatch.setattr(energy, "open_meter", lambda *asked: (None, reasons))
    result = bench(pruned, "--require-energy")
    assert result.code == 3
    assert "energy was not measured: no meter here" in result.err
    assert report(pruned).batches[0].energy_reasons == reasons
    assert report(pruned).batches[0].timing.subjects["sparse"].median_ms > 0
    assert bench(pruned).code == 0, "without the option it is a reason in the report"

    class Dying:
        """A GPU that is lost as soon as it is asked for its counter a second time."""

        source, has_counter, power_source, fewest_calls = "NVML", True, None, 1

        def read(self) -> Reading:
            raise MeterError("the GPU was lost (NVML code 15)")

        def power_w(self) -> float:
            raise MeterError("no power")

        def facts(self) -> dict[str, str]:
            return {"name": "a GPU"}

    monkeypatch.setattr(energy, "open_meter", lambda *asked: (Dying(), []))
    result = bench(pruned, "--no-resume")
    assert result.code == 0, result.err
    assert "the GPU was lost (NVML code 15)" in result.out
    assert report(pruned).batches[0].timing.subjects["dense"].median_ms > 0


@pytest.mark.parametrize("change", ["window_seconds=0", "window_seconds=-1", "trials=3"])
def test_windows_need_a_duration_and_intervals_six_trials(tmp_path: Path, change: str) -> None:
    result = run_cli("bench", "digits_vit", "-o", tmp_path / "run", "--set", f"bench.energy.{change}")
    assert result.code == 2
    assert f"bench.energy.{change.split('=')[0]}: should be greater than" in result.err


def test_a_baseline_for_other_images_is_refused(pruned: Path, tmp_path: Path) -> None:
    kwargs = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 10}
    section = ModelSection(name="vit_tiny_patch16_224", kwargs=kwargs)
    model = build_model(section)
    save_model(tmp_path / "other", model, model_config(section, model))
    result = bench(pruned, "--baseline", tmp_path / "other")
    assert result.code == 2
    assert "takes images of [3, 48, 48], the model of the recipe [3, 32, 32]" in result.err


# too little memory


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let larger batches than `most` run out of memory, as a GPU's do."""
    real = subjects.forward_of

    def only(most: int) -> None:
        def forward_of(model: Any, images: torch.Tensor) -> Any:
            if len(images) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return real(model, images)

        monkeypatch.setattr(subjects, "forward_of", forward_of)

    return only


def test_a_batch_that_does_not_fit_is_halved_until_it_does(pruned: Path, fits: Callable[[int], None]) -> None:
    fits(3)
    result = bench(pruned, bench__batch_sizes="[16]")
    assert result.code == 0, result.err
    (batch,) = report(pruned).batches
    assert (batch.batch_size, batch.asked_batch_size) == (2, 16)
    assert "note: batch 16 does not fit into memory: measured batch 2 instead" in result.out


def test_halves_that_are_measured_anyway_are_not_measured_twice(pruned: Path, fits: Callable[[int], None]) -> None:
    fits(3)
    result = bench(pruned, bench__batch_sizes="[8,2]")
    assert [batch.batch_size for batch in report(pruned).batches] == [2]
    assert "batch 8 does not fit into memory: left out, as batch 2 is measured anyway" in " ".join(result.out.split())


def test_a_batch_that_never_fits_is_an_error(pruned: Path, fits: Callable[[int], None]) -> None:
    fits(0)
    result = bench(pruned, bench__batch_sizes="[5]")
    assert result.code == 3
    assert "not even a batch of 1 in float32 fits into the memory of cpu" in result.err


def test_too_little_memory_on_a_cpu_is_told_by_its_message() -> None:
    with pytest.raises(RuntimeError, match=OUT_OF_MEMORY):
        torch.empty(2**60)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees no CUDA device")
def test_a_bench_on_a_gpu_has_graphs_memory_and_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "energy_on", lambda *_, **__: (None, ["minutes of windows are not for a test"]))
    synthetic = ["--set", "data.dataset=synthetic", "--set", "model.weights=null"]
    folder, arguments = tmp_path / "run", [*options(bench__batch_sizes="[64]"), *synthetic]
    for command in (["calibrate"], ["prune"], ["bench", "--layers"]):
        result = run_cli(*command, "digits_vit", "-o", folder, *arguments)
        assert result.code == 0, result.err
    (batch,) = report(folder).batches
    assert list(batch.timing.subjects) == ["dense", "masked-dense", "sparse", "dense-graph", "sparse-graph"]
    held = batch.peak_memory_bytes["dense"]
    assert held is not None
    assert held > 2 * 1_450_000, "at least the weights, in bfloat16"
    assert batch.layers is not None
    assert 0 < sum(layer.ms for layer in batch.layers.layers) < batch.layers.total_ms
