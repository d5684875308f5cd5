"""Budgets beyond one number: sweeps from one calibration, and the search for an accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import Demo, copy_run, run_cli

from lpvit_cli import load_model
from lpvit_cli.errors import UsageError
from lpvit_cli.pruning import engine
from lpvit_cli.pruning.budgets.max_drop import search
from lpvit_cli.recipe.prune import Budget
from lpvit_cli.sparse import sparse_layers


@pytest.fixture
def calibrated(demo: Demo, tmp_path: Path) -> Path:
    """A run folder that has the demo's calibration and nothing else."""
    return copy_run(demo.folder, tmp_path / "run", "recipe.yaml", "calibration")


def test_a_sweep_makes_a_model_for_every_budget_from_one_calibration(calibrated: Path, demo: Demo) -> None:
    arguments = ("prune", "digits_vit", "-o", calibrated, *demo.options, "--sweep", "0.5,0.3,0.7")
    result = run_cli(*arguments, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert [point["budget"] for point in report["points"]] == [0.5, 0.3, 0.7]
    assert "calibrating" not in result.err
    for point in report["points"]:
        assert 0 <= 1 - point["budget"] - point["report"]["linear_kept_fraction"] < 0.011  # a block is 1 % of the weights
        evaluated = run_cli("evaluate", calibrated / "sweep" / point["folder"], "--json")
        assert json.loads(evaluated.out)["accuracy"] == point["report"]["accuracy"]
    same, pruned = load_model(calibrated / "sweep" / "0.5"), load_model(demo.folder / "pruned")
    for name, layer in sparse_layers(pruned).items():
        assert torch.equal(layer.values, sparse_layers(same)[name].values), "a point of a sweep is what prune alone makes"
    assert (calibrated / "sweep" / "sweep.svg").read_text().startswith("<svg")
    again = run_cli(*arguments)
    assert "sweep: up to date, skipped" in again.err
    assert "0.7" in again.out


@pytest.mark.parametrize("sweep", ["0.5,1.5", "a", ""])
def test_sweeps_that_are_no_budgets(calibrated: Path, demo: Demo, sweep: str) -> None:
    result = run_cli("prune", "digits_vit", "-o", calibrated, *demo.options, "--sweep", sweep)
    assert result.code == 2
    assert "sweep" in result.err
    assert not (calibrated / "sweep").exists()


def test_max_drop_finds_the_sparsest_model_within_the_drop(calibrated: Path, demo: Demo) -> None:
    def prune(*budget: str) -> dict:  # type: ignore[type-arg]
        changes = ("prune.reweigh=0", "prune.sequential=false", *budget)  # a dozen models are made
        settings = [option for change in changes for option in ("--set", change)]
        result = run_cli("prune", "digits_vit", "-o", calibrated, *demo.options, *settings, "--json")
        assert result.code == 0, result.err
        return json.loads(result.out)

    found = prune("prune.budget.max_drop=1.0")
    least = found["accuracy_dense"]["top1"] - 1
    assert found["accuracy"]["top1"] >= least
    left = found["flops"] / found["flops_dense"]
    assert left < 0.5, "half the FLOPs cost nothing here, so there is more to find"
    sparser = prune(f"prune.budget.flops={round(left, 2) - 0.01:.2f}")
    assert sparser["accuracy"]["top1"] < least


class Cliff:
    """A plan whose models keep their accuracy down to some fraction of the FLOPs, and lose it all below."""

    def __init__(self, edge: float, lowest: float = 0.2) -> None:
        self.edge, self.lowest, self.evaluated = edge, lowest, 0

    def reachable(self, budget: Budget) -> float:
        assert budget.kind == "flops"
        return self.lowest

    def judge(self, model: Budget, what: str) -> float:
        self.evaluated += 1
        assert model.kind == "flops"
        return 90.0 if model.value >= self.edge else 10.0


@pytest.fixture
def budgets_for_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pruned model is known by its budget."""
    monkeypatch.setattr(engine, "prune_model", lambda plan, budget, progress: (budget, None))


@pytest.mark.usefixtures("budgets_for_models")
@pytest.mark.parametrize(("edge", "found"), [(0.41, 0.41), (0.1, 0.2), (0.985, 0.99)])
def test_the_search_finds_the_edge_with_few_evaluations(edge: float, found: float) -> None:
    plan = Cliff(edge)
    assert search(plan, 89.0, plan.judge, lambda *_: None).value == pytest.approx(found)  # type: ignore[arg-type]
    assert plan.evaluated <= 7


@pytest.mark.usefixtures("budgets_for_models")
def test_a_drop_that_no_pruned_model_keeps_is_refused() -> None:
    plan = Cliff(0.5)
    with pytest.raises(UsageError, match="no pruned model keeps 95.00 points"):
        search(plan, 95.0, plan.judge, lambda *_: None)  # type: ignore[arg-type]


def test_too_few_images_for_the_rank_are_a_warning_with_numbers(tmp_path: Path) -> None:
    options = ("digits_vit", "-o", tmp_path / "run", "--set", "calibrate.images=8", "--set", "data.val_images=8")
    assert run_cli("calibrate", *options).code == 0
    (warning,) = [
        note for note in json.loads(run_cli("prune", *options, "--json").out)["notes"] if "tokens" in note and "saw" in note
    ]
    told = "calibration saw 136 tokens of blocks.0.mlp.fc2, fewer than its 960 inputs (8 such layers): raise calibrate.images"
    assert warning == told


def test_sequential_pruning_keeps_the_budget_and_the_accuracy(calibrated: Path, demo: Demo) -> None:
    arguments = ("prune", "digits_vit", "-o", calibrated, *demo.options, "--set", "prune.budget.sparsity=0.7", "--json")
    arguments += ("--set", "prune.reweigh=0")
    plain, sequential = (json.loads(run_cli(*arguments, "--set", f"prune.sequential={s}").out) for s in ("false", "true"))
    assert [layer["kept_blocks"] for layer in sequential["layers"]] == [layer["kept_blocks"] for layer in plain["layers"]]
    assert sequential["layers"] != plain["layers"], "other blocks are kept"
    assert sequential["accuracy"]["top1"] >= plain["accuracy_dense"]["top1"] - 1
