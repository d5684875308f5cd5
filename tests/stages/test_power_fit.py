"""A power model from benches to pruning, on a board whose coefficients are known; and what is refused on the way."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Result, run_cli
from measure.synthetic import Board

from lpvit_cli import load_model
from lpvit_cli.bench import subjects as subjects_module
from lpvit_cli.bench import work as stage
from lpvit_cli.measure.energy import run as energy_module
from lpvit_cli.measure.energy.run import EnergyRun
from lpvit_cli.measure.profile import DeviceProfile
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.report.schema import BenchReport
from lpvit_cli.report.terminal.profile import power_lines
from lpvit_cli.sparse import densify, sparse_layers

E_MAC, E_BYTE, STATIC = 2e6, 1e7, 80.0  # pJ, pJ, W: a small model on a slow board
SMALL = [
    "model.weights=null",
    "model.kwargs={img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 4, num_classes: 10}",
    "data.dataset=synthetic",
    "calibrate.images=32",
    "calibrate.batch_size=16",
    "prune.block=[16,8]",
    "prune.reweigh=0",
    "finetune=null",
    "profile.rounds=6",
    "bench.rounds=6",
    "bench.warmup_seconds=0",
    "target.threads=1",
    "bench.batch_sizes=[1,4]",
    "bench.energy.window_seconds=2",
    "device=cpu",
]


def command(what: str, folder: Path, *options: Any, changes: tuple[str, ...] = ()) -> Result:
    settings = [option for change in (*SMALL, *changes) for option in ("--set", change)]
    return run_cli(what, "digits_vit", "-o", folder, *settings, *options, "--json")


@contextmanager
def board_as_device() -> Iterator[None]:
    """A call takes 40 ms and 3 ms an image, more where more is kept, and the joules of the coefficients above. Only while
    energy is measured: times are those of a forward pass that does nothing."""
    board = Board()
    measuring = False

    def forward_of(model: VisionModel, images: torch.Tensor) -> Any:
        work = stage.work_of(model, images)
        seconds = 0.04 + 0.003 * len(images) + 2e-9 * work.macs**0.9
        watts = STATIC + 1e-12 * (E_MAC * work.macs + E_BYTE * work.moved_bytes) / seconds
        return lambda: board.spend(seconds, watts) if measuring else None

    def measure_energy(*subjects: Any, **how: Any) -> EnergyRun:
        nonlocal measuring
        measuring = True
        try:
            return measure(*subjects, **how, clock=board.clock, sleep=board.sleep, polling=board.polling)
        finally:
            measuring = False

    measure = energy_module.measure_energy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects_module, "forward_of", forward_of)
        patch.setattr(subjects_module, "freeze", lambda model, batch: model)  # the board counts what bench counts
        patch.setattr(stage, "run_dense", lambda model, batch_size: [])  # whatever was the fastest here
        patch.setattr(energy_module, "open_meter", lambda *device: (board, []))
        patch.setattr(energy_module, "measure_energy", measure_energy)
        yield


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Run folders by sparsity."""
    folders = {}
    for sparsity in (0.3, 0.7):
        folder = folders[sparsity] = tmp_path_factory.mktemp("benched") / "run"
        for what in ("calibrate", "prune", "bench"):
            with board_as_device():
                result = command(what, folder, changes=(f"prune.budget.sparsity={sparsity}",))
            assert result.code == 0, result.err
    return folders


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LPVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def saved(folder: Path, runs: list[Path], name: str = "board", changes: tuple[str, ...] = ()) -> Result:
    return command("profile", folder, "--name", name, *(f"--fit={run}" for run in runs), changes=changes)


def test_a_bench_counts_what_its_subjects_execute(benched: dict[float, Path]) -> None:
    report = BenchReport.model_validate_json((benched[0.7] / "bench" / "report.json").read_text())
    one, four = report.batches
    assert set(one.work) == {"dense", "sparse"}
    assert one.work["dense"].macs == report.flops_dense / 2
    assert 0.7 * report.flops / 2 < one.work["sparse"].macs <= report.flops / 2, "what leads nowhere is cut out"
    assert four.work["dense"].macs == 4 * one.work["dense"].macs
    weights, activations = (four.work["dense"].moved_bytes - one.work["dense"].moved_bytes) / 3, one.work["dense"].moved_bytes
    assert weights < activations < four.work["dense"].moved_bytes


def test_benches_at_two_sparsities_give_back_the_coefficients_of_the_board(
    benched: dict[float, Path], tmp_path: Path, cache: Path
) -> None:
    result = saved(tmp_path / "run", list(benched.values()))
    assert result.code == 0, result.err
    document = json.loads(result.out)["saved"]
    power = document["profile"]["power"]
    for name, truth in (("e_mac_pj", E_MAC), ("e_byte_pj", E_BYTE), ("static_w", STATIC)):
        assert power[name]["low"] <= truth <= power[name]["high"]
        assert power[name]["value"] == pytest.approx(truth, rel=0.15)  # by the blocks that are kept
    assert power["points"] == 8
    assert power["largest_error"] < 0.02, "a window begins and ends up to a call early or late"
    assert document["path"] == str(cache / "profiles" / "board.json")
    profile = DeviceProfile.load(cache / "profiles" / "board.json")
    assert profile.energy_source is not None
    assert "fitted to 8 measured calls (synthetic)" in profile.energy_source
    assert profile.rest_mj is not None


def test_layers_that_run_as_dense_ones_work_as_such(benched: dict[float, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(benched[0.7] / "pruned")
    images = torch.zeros(2, 3, 32, 32)
    monkeypatch.setattr(stage, "run_dense", lambda model, batch_size: [])
    sparse = stage.work_of(model, images)
    monkeypatch.setattr(stage, "run_dense", lambda model, batch_size: list(sparse_layers(model)))
    as_dense, dense = stage.work_of(model, images), stage.work_of(densify(model), images)
    assert as_dense.macs == dense.macs > sparse.macs
    indices = sum(layer.row_ptr.nbytes + layer.cols.nbytes for layer in sparse_layers(model).values())
    assert as_dense.moved_bytes - indices == dense.moved_bytes > sparse.moved_bytes


@pytest.fixture(scope="module")
def fitted(benched: dict[float, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the profile `board`."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LPVIT_CACHE", str(folder / "cache"))
        result = saved(folder / "run", list(benched.values()))
    assert result.code == 0, result.err
    return folder / "cache"


def test_prune_takes_energies_of_the_profile_by_its_name(
    fitted: Path, benched: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPVIT_CACHE", str(fitted))
    profile = DeviceProfile.load(fitted / "profiles" / "board.json")
    assert profile.model_mj is not None
    assert profile.rest_mj is not None
    budget = 0.85 * profile.model_mj + 0.15 * profile.rest_mj  # within reach, however slow sparse layers were here
    changes = ("prune.profile=board", f"prune.budget.energy_mj={budget}", "prune.min_keep=0")
    shutil.copytree(benched[0.3] / "calibration", tmp_path / "run" / "calibration")
    shutil.copy(benched[0.3] / "recipe.yaml", tmp_path / "run")
    result = command("prune", tmp_path / "run", changes=changes)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    kept = sum(layer["energy_uj"] for layer in report["layers"]) / 1000
    assert budget * 0.9 < kept + profile.rest_mj <= budget
    whole = sum(layer["energy_uj_dense"] for layer in report["layers"]) / 1000
    assert whole == pytest.approx(sum(len(layer.names) * (layer.dense_mj or 0) for layer in profile.layers))
    assert any(note.startswith("energy is predicted by the profile of") for note in report["notes"])
    assert "profile: board" in (tmp_path / "run" / "recipe.yaml").read_text(), "a name is no path"
    predicted = json.loads(command("prune", tmp_path / "run", "--dry-run", changes=changes).out)["prediction"]
    assert predicted["energy_uj_dense"] == pytest.approx(1000 * whole)


def test_doctor_lists_the_saved_profiles(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(fitted, tmp_path / "cache")
    monkeypatch.setenv("LPVIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "profiles" / "torn.json").write_text("{")
    found = {finding["what"]: finding for finding in json.loads(run_cli("doctor", "--json").out)}
    assert "energy by a power model fitted to 8" in found["profile board"]["detail"]
    assert not found["profile torn"]["ok"]
    monkeypatch.setenv("LPVIT_CACHE", str(tmp_path / "none"))
    found = {finding["what"]: finding for finding in json.loads(run_cli("doctor", "--json").out)}
    assert "lpvit profile RECIPE --name NAME" in found["device profiles"]["remedy"]


def test_a_name_that_nothing_was_saved_under_is_told_with_those_there_are(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPVIT_CACHE", str(fitted))
    changes = ("prune.profile=h200", "prune.budget.energy_mj=1")
    assert command("calibrate", tmp_path / "run", changes=changes).code == 0
    result = command("prune", tmp_path / "run", changes=changes)
    assert result.code == 2
    error = json.loads(result.out)["error"]
    assert "h200.json: no such device profile" in error["message"]
    assert error["hint"].startswith("saved here are board; or make one: lpvit profile RECIPE --name NAME")


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({}, "at least two sparsities, these have one"),
        ({"device": "a faster one"}, "is of a faster one"),
        ({"dtype": "bfloat16"}, "is in bfloat16, the profile in float32"),
        ({"work": {}}, "made before bench counted"),
        ({"energy": None, "energy_reasons": ["no meter here"]}, "has no energy of known work: no meter here"),
    ],
)
def test_runs_that_do_not_fit_are_refused_and_nothing_is_saved(
    edit: dict[str, Any], told: str, benched: dict[float, Path], tmp_path: Path, cache: Path
) -> None:
    report = json.loads((benched[0.3] / "bench" / "report.json").read_text())
    for holder in (report, *report["batches"]):
        holder |= {key: value for key, value in edit.items() if key in holder}
    other = tmp_path / "edited.json"
    other.write_text(json.dumps(report))
    result = saved(tmp_path / "run", [benched[0.3], other])
    assert result.code == 2
    assert told in json.loads(result.out)["error"]["message"]
    assert not (cache / "profiles").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--fit", "run"], "--fit: which name"),
        (["--name", "../h200"], "not a name"),
        (["--name", "h200", "--fit", "nowhere"], "nowhere: no report of bench there"),
        (["--name", "h200", "--smoke"], "a rehearsal"),
    ],
)
def test_what_cannot_be_saved_is_told_before_anything_is_measured(options: list[str], told: str, tmp_path: Path) -> None:
    result = run_cli("profile", "digits_vit", "-o", tmp_path / "run", *options)
    assert result.code == 2
    assert told in result.err
    assert not (tmp_path / "run").exists()


def test_force_is_refused_where_nothing_is_compared(tmp_path: Path) -> None:
    result = run_cli("bench", "digits_vit", "-o", tmp_path / "run", "--force")
    assert result.code == 2
    assert "--force is for --compare" in result.err


def test_a_report_of_another_version_is_told_with_the_way_to_make_it_again(benched: dict[float, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(benched[0.3], folder)
    path = folder / "pruned" / "report.json"
    path.write_text(path.read_text().replace('"flops_dense"', '"flops_of_old"', 1))
    result = command("prune", folder, changes=("prune.budget.sparsity=0.3",))
    assert result.code == 3
    assert "report.json: not a report of this version" in json.loads(result.out)["error"]["message"]
    assert "lpvit prune digits_vit" in json.loads(result.out)["error"]["hint"]


def test_a_run_exports_before_it_measures_the_exported_file(tmp_path: Path) -> None:
    asked = ("--set", "bench.subjects=[dense,sparse,onnx]", "--dry-run", "--json")
    result = run_cli("run", "digits_vit", "-o", tmp_path / "run", *asked)
    assert list(json.loads(result.out)["stages"])[-2:] == ["export", "bench"]


def test_the_terminal_tells_the_coefficients_with_their_intervals(fitted: Path) -> None:
    first, mac, byte, static, error = power_lines(DeviceProfile.load(fitted / "profiles" / "board.json"))
    assert first == "energy by a power model fitted to 8 measured calls (synthetic)"
    for line, what, unit in ((mac, "multiply-add", "pJ"), (byte, "byte moved", "pJ"), (static, "static", "W")):
        assert re.fullmatch(rf"  {what} +[\d.]+ {unit} \(95 % interval [\d.]+ to [\d.]+\)", line)
    assert re.search(r"error of the fit \d\.\d% \(median\), \d\.\d% at most; by it the whole model takes \d+ mJ", error)
