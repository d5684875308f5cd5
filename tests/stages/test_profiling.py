"""`lpvit profile`: what is measured and under which name it is kept; the command, its folder, meters there and not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Result, relative, run_cli
from measure.synthetic import Board
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from lpvit_cli import Recipe
from lpvit_cli.bench import profiling
from lpvit_cli.cli.console import Console
from lpvit_cli.measure.energy import run as energy_module
from lpvit_cli.measure.energy.meters.base import MeterError, Reading
from lpvit_cli.measure.energy.power import Work
from lpvit_cli.measure.energy.run import Energy, EnergyRun
from lpvit_cli.measure.profile import DeviceProfile
from lpvit_cli.measure.statistics import percentiles
from lpvit_cli.measure.timing import Subject, Timing, TimingRun
from lpvit_cli.sparse import BlockSparseLinear
from lpvit_cli.stages import PROFILE, run_of
from lpvit_cli.stages import profile as stage

QUICK = ["--set", "profile.rounds=6", "--device", "cpu"]
NO_METER = "no meter in this test"


def without_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy_module, "open_meter", lambda *device: (None, [NO_METER]))


def quiet(*args: object) -> None:
    pass


# what is measured


def cost(subject: partial[Any]) -> float:
    """Milliseconds and joules that a made-up device takes: a million for a model, else weights kept, times 3 when dense."""
    module = subject.func
    if isinstance(module, BlockSparseLinear):
        return float(module.weight.to_dense().count_nonzero())
    return 3.0 * module.weight.numel() if isinstance(module, nn.Linear) else 1e6


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No clock and no meter but `cost`; what the stage asked to be measured, and how."""
    asked: dict[str, Any] = {}

    def time(subjects: dict[str, Subject], **how: Any) -> TimingRun:
        asked.update(how, subjects=subjects, threads=torch.get_num_threads(), inference=torch.is_inference_mode_enabled())
        samples = {name: [0.5 * cost(one), cost(one), 9 * cost(one)] for name, one in subjects.items()}
        timed = {name: Timing(ms, percentiles(ms), 0.0, 0.0, 1, None, False) for name, ms in samples.items()}
        return TimingRun(timed, torch.get_num_threads(), foreign_load=None)

    def energy(device: torch.device, subjects: dict[str, Subject], images_per_call: int, **how: Any) -> Any:
        asked.update(how, images_per_call=images_per_call)
        return EnergyRun("made up", 0.0, {name: Energy(cost(one), 0.0, 0.0, []) for name, one in subjects.items()}), []

    monkeypatch.setattr(profiling, "time_interleaved", time)
    monkeypatch.setattr(profiling, "energy_on", energy)
    return asked


def profiled(work: Path, *overrides: str, **prune: Any) -> DeviceProfile:
    recipe = Recipe.load("digits_vit", ["device=cpu", *overrides])
    recipe = recipe.model_copy(update={"prune": recipe.prune.model_copy(update=prune)})
    report = stage.run_stage(recipe, run_of(recipe, work), work, quiet)
    loaded = DeviceProfile.load(work / "profile.json")
    assert loaded == report.profile
    return loaded


def test_every_number_is_that_of_its_layer_block_and_kept_fraction(tmp_path: Path, made_up: dict[str, Any]) -> None:
    profile = profiled(tmp_path, block=((240, 60), (32, 64)))
    shapes = {(720, 240): "attn.qkv", (240, 240): "attn.proj", (960, 240): "mlp.fc1", (240, 960): "mlp.fc2"}
    assert {layer.shape: layer.names for layer in profile.layers} == {
        shape: [f"blocks.{n}.{name}" for n in range(2)] for shape, name in shapes.items()
    }
    for layer in profile.layers:
        weights = layer.shape[0] * layer.shape[1]
        assert (layer.rows, layer.bias, layer.dense_ms, layer.dense_mj) == (17, True, 3 * weights, 3000 * weights)
        assert [sparse.block for sparse in layer.sparse] == [(240, 60), (32, 64)]
        even, ragged = layer.sparse
        assert even.ms == pytest.approx([kept * weights for kept in even.kept])
        assert even.mj == pytest.approx([1000 * ms for ms in even.ms])
        assert ragged.ms == sorted(ragged.ms), "blocks at ragged edges hold fewer weights"
        assert ragged.kept[-1] == even.kept[-1] == 1
        assert ragged.ms[-1] == weights
        assert ragged.kept == pytest.approx([0.05, 0.1, 0.25, 0.5, 0.75, 1], abs=0.5 / 32)
    linear = sum(2 * layer.dense_ms for layer in profile.layers)
    assert linear > 1e6
    assert (profile.model_ms, profile.rest_ms, profile.model_mj, profile.energy_source) == (1e6, 0, 1e9, "made up")


def test_fractions_are_of_whole_blocks_each_measured_once(tmp_path: Path, made_up: dict[str, Any]) -> None:
    kept = {layer.shape: layer.sparse[0].kept for layer in profiled(tmp_path).layers}
    assert kept[240, 240] == [1 / 4, 2 / 4, 3 / 4, 1]
    assert kept[720, 240] == [1 / 12, 3 / 12, 6 / 12, 9 / 12, 1]
    assert kept[960, 240] == [1 / 16, 2 / 16, 4 / 16, 8 / 16, 12 / 16, 1]


def test_dense_and_sparse_get_the_same_input_and_with_all_blocks_agree(tmp_path: Path, made_up: dict[str, Any]) -> None:
    profiled(tmp_path, "target.batch_size=3")
    subjects = made_up["subjects"]
    assert subjects["model"].args[0].shape == (3, 3, 32, 32)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        of_layer = {key: one for key, one in subjects.items() if key.startswith(f"blocks.0.{name} ")}
        (x,) = {id(one.args[0]): one.args[0] for one in of_layer.values()}.values()
        assert len(x) == 3 * 17
        dense, full = (of_layer[key] for key in (f"blocks.0.{name} dense", list(of_layer)[-1]))
        assert full.func.weight.density == 1
        assert relative(full(), dense()) < 1e-6
    assert subjects.keys() == {"model"} | {key for key in subjects if key.startswith("blocks.0.")}


def test_how_it_is_measured_follows_the_recipe(tmp_path: Path, made_up: dict[str, Any]) -> None:
    before = torch.get_num_threads()
    more = f"target.threads={before + 1}"
    profile = profiled(tmp_path, "profile.rounds=9", "bench.dtypes=[bfloat16]", more, "bench.energy.window_seconds=3")
    assert (made_up["rounds"], made_up["window_s"], made_up["images_per_call"]) == (9, 3, 1)
    assert (made_up["threads"], made_up["inference"]) == (before + 1, True)
    assert torch.get_num_threads() == before
    assert {one.args[0].dtype for one in made_up["subjects"].values()} == {torch.bfloat16}
    assert (profile.threads, profile.dtype, profile.batch_size) == (before + 1, "bfloat16", 1)
    assert profile.provenance["versions"]["torch"]


@pytest.mark.parametrize("allowed", [False, True])
def test_a_gpu_split_by_mig_is_measured_where_the_recipe_allows_it(
    tmp_path: Path, made_up: dict[str, Any], allowed: bool
) -> None:
    profiled(tmp_path, f"bench.energy.allow_mig={str(allowed).lower()}", block=(60, 60))
    assert made_up["allow_mig"] is allowed


def test_layers_of_one_shape_that_see_different_rows_are_kept_apart(tmp_path: Path, made_up: dict[str, Any]) -> None:
    profile = profiled(tmp_path, "prune.layers.include=[blocks.0.*, head]", "model.kwargs.num_classes=240", block=(60, 60))
    assert [(layer.rows, layer.names) for layer in profile.layers if layer.shape == (240, 240)] == [
        (17, ["blocks.0.attn.proj"]),
        (1, ["head"]),
    ]


def test_layers_without_bias_are_measured_without(tmp_path: Path, made_up: dict[str, Any]) -> None:
    profile = profiled(tmp_path, "model.kwargs.qkv_bias=false")
    assert {layer.shape: layer.bias for layer in profile.layers}[720, 240] is False
    subjects = {key: one.func for key, one in made_up["subjects"].items() if "qkv" in key}
    assert all(module.bias is None for module in subjects.values())


def test_pretrained_weights_are_not_asked_for(tmp_path: Path, made_up: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    build = stage.build_model
    monkeypatch.setattr(stage, "build_model", lambda section, *task: asked.append(section) or build(section, *task))
    profiled(tmp_path, "model.weights=null", "model.pretrained=true")
    assert [(section.pretrained, section.weights) for section in asked] == [(False, None)]


def test_doubts_are_told() -> None:
    timing = TimingRun({"a": Timing([1.0], percentiles([1.0]), 1, 0, 1, None, host_bound=True)}, 1, foreign_load=0.5)
    facts: dict[str, Any] = {"device": "d", "dtype": "float32", "threads": 1, "model": "m", "batch_size": 1, "provenance": {}}
    facts |= {"model_work": Work(1, 1), "model_mj": None, "energy_source": None, "energy_reasons": [], "layers": []}
    busy, host = profiling.advice(timing, DeviceProfile(model_ms=1, **facts))
    assert "other processes used 50%" in busy
    assert "1 of 1 times are the host's" in host


def test_a_model_faster_than_its_layers_is_doubtful(tmp_path: Path, made_up: dict[str, Any]) -> None:
    recipe = Recipe.load("digits_vit", ["device=cpu"])
    (note,) = stage.run_stage(recipe, run_of(recipe, tmp_path), tmp_path, quiet).notes
    assert "longer than the whole model" in note


# the command


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A profile of the demo's model on this machine."""
    folder = tmp_path_factory.mktemp("profile") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_meter(patch)
        result = run_cli("profile", "digits_vit", "-o", folder, *QUICK)
    assert result.code == 0, result.err
    return folder, result


def test_the_profile_is_measured_without_calibration_and_kept(once: tuple[Path, Result]) -> None:
    folder, result = once
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "profile", "recipe.yaml"]
    assert sorted(p.name for p in (folder / "profile").iterdir()) == ["profile.json", "report.json", "stage.json"]
    profile = DeviceProfile.load(folder / "profile" / "profile.json")
    assert [len(layer.names) for layer in profile.layers] == [2, 2, 2, 2]
    times = [ms for layer in profile.layers for sparse in layer.sparse for ms in (layer.dense_ms, *sparse.ms)]
    assert len(times) == 5 + 4 + 6 + 6 + 4
    assert profile.rest_ms == max(0, profile.model_ms - sum(2 * layer.dense_ms for layer in profile.layers))
    record = json.loads((folder / "profile" / "stage.json").read_text())
    assert record["device"] == profile.device == record["inputs"]["measured on"]
    assert "batch 1" in result.out
    assert "240x240 on 17 rows, blocks 240x60: sparse " in result.out


def test_energy_that_no_meter_gave_is_null_with_the_reason(once: tuple[Path, Result]) -> None:
    folder, result = once
    content = json.loads((folder / "profile" / "profile.json").read_text())
    assert content["energy_reasons"] == [NO_METER]
    energies = [content["model_mj"], content["rest_mj"], content["energy_source"]]
    energies += [mj for layer in content["layers"] for mj in (layer["dense_mj"], *(s["mj"] for s in layer["sparse"]))]
    assert set(energies) == {None}
    assert f"energy   not measured: {NO_METER}" in result.out
    assert "mJ" not in result.out


def test_it_is_skipped_while_it_holds(once: tuple[Path, Result]) -> None:
    folder, _ = once
    before = {path: path.stat().st_mtime_ns for path in folder.glob("profile/*")}
    again = run_cli("profile", "digits_vit", "-o", folder, *QUICK, "--json")
    assert again.code == 0, again.err
    assert "profile: up to date, skipped" in again.err
    assert json.loads(again.out) == json.loads((folder / "profile" / "report.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in folder.glob("profile/*")} == before


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        (["--batch-size", "2"], "runs again (target.batch_size: 1 -> 2)"),
        (["--dtype", "bfloat16"], "runs again (target.precision: auto -> bfloat16)"),
        (["--set", "target.threads=1"], "runs again (target.threads: None -> 1)"),
        (["--set", "prune.block=[60,60]"], "runs again (prune.block: [240, 60] -> [60, 60])"),
        (["--set", "model.kwargs.depth=3"], "runs again (model.kwargs.depth: 2 -> 3)"),
        (["--set", "model.weights=null", "--set", "prune.budget.flops=0.6", "--set", "data.val_images=9"], "up to date"),
    ],
)
def test_it_is_made_again_when_what_it_depends_on_changes(once: tuple[Path, Result], options: list[str], plan: str) -> None:
    result = run_cli("profile", "digits_vit", "-o", once[0], *QUICK, *options, "--dry-run", "--json")
    assert json.loads(result.out)["stages"] == {"profile": plan}


def test_it_does_not_hold_on_another_machine(once: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(Recipe.load(once[0] / "recipe.yaml"), once[0])
    assert run.changes(PROFILE) == []
    monkeypatch.setattr("lpvit_cli.devices.describe_device", lambda device: "a faster one")
    (change,) = run.changes(PROFILE) or [""]
    assert change.endswith("-> a faster one")


def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Console, what: str, done: int, total: int, detail: str) -> None:
        assert (what, total) == ("timing the layers", 6)
        assert os.listdir(tmp_path / "run" / ".profile.partial") == []
        raise KeyboardInterrupt

    monkeypatch.setattr(Console, "progress", interrupt)
    assert run_cli("profile", "digits_vit", "-o", tmp_path / "run", *QUICK).code == 130
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "recipe.yaml"]


def test_a_block_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    result = run_cli("profile", "digits_vit", "-o", tmp_path / "run", *QUICK, "--set", "prune.block=[2048,32]")
    assert result.code == 2
    assert "2048x32 is larger than layer blocks.0.attn.qkv" in result.err


def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_meter(monkeypatch)
    only = ["--set", "prune.layers.include=[blocks.*.attn.qkv]", "--device", "cpu"]
    result = run_cli("profile", "deit_small_50", "-o", tmp_path / "run", *only, "--smoke", "--json")
    assert result.code == 0, result.err
    profile = json.loads(result.out)["profile"]
    assert [(layer["shape"], layer["rows"], len(layer["names"])) for layer in profile["layers"]] == [([1152, 384], 34, 2)]


# energy


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    """Every linear layer that is called works for 40 ms: at 300 W when it is dense, at 150 W when it is block-sparse."""
    board = Board()

    def work(module: nn.Module, x: object, y: object) -> None:
        if isinstance(module, nn.Linear | BlockSparseLinear):
            board.spend(0.04, 300 if isinstance(module, nn.Linear) else 150)

    monkeypatch.setattr(energy_module, "open_meter", lambda *device: (board, []))
    measure = partial(energy_module.measure_energy, clock=board.clock, sleep=board.sleep)
    monkeypatch.setattr(energy_module, "measure_energy", measure)
    handle = register_module_forward_hook(work)
    yield board
    handle.remove()


def profiled_with_meter(folder: Path) -> tuple[DeviceProfile, str]:
    few = ["prune.layers.include=[blocks.*.attn.proj]", "bench.energy.window_seconds=2"]
    few += ["model.weights=null", "model.kwargs.depth=1"]
    result = run_cli("profile", "digits_vit", "-o", folder, *QUICK, *(option for change in few for option in ("--set", change)))
    assert result.code == 0, result.err
    return DeviceProfile.load(folder / "profile" / "profile.json"), result.out


def test_a_meter_gives_millijoules_per_call(tmp_path: Path, board: Board) -> None:
    profile, text = profiled_with_meter(tmp_path / "run")
    (layer,) = profile.layers
    (sparse,) = layer.sparse
    one_call = 0.04 / 2  # of a window; it may begin and end up to a call early or late
    assert layer.dense_mj == pytest.approx(300 * 40, rel=2 * one_call)
    assert sparse.mj == pytest.approx([150 * 40] * 4, rel=2 * one_call)
    linears = 5  # four in the block, and the head
    assert profile.model_mj == pytest.approx(linears * 300 * 40, rel=2 * linears * one_call)
    assert profile.rest_mj == profile.model_mj - layer.dense_mj
    assert (profile.energy_source, profile.energy_reasons) == ("synthetic", [])
    assert "energy by synthetic: whole model" in text
    assert "mJ per call" in text
    assert "not measured" not in text


def test_a_meter_that_fails_half_way_leaves_no_number(tmp_path: Path, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter(range(1000))

    def read() -> Reading:
        if next(reads) == 500:  # in the second of three trials
            raise MeterError("the GPU was lost")
        return Board.read(board)

    monkeypatch.setattr(board, "read", read)
    profile, text = profiled_with_meter(tmp_path / "run")
    assert (profile.model_mj, profile.energy_source, profile.energy_reasons) == (None, None, ["the GPU was lost"])
    assert profile.layers[0].dense_mj is profile.layers[0].sparse[0].mj is None
    assert "energy   not measured: the GPU was lost" in text
