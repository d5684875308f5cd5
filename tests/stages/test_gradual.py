"""Pruning and recovering in turns: what is gone stays gone, a killed step goes on, and bench and export take the last model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import run_cli
from safetensors.torch import load_file

from lpvit_cli.cli.console import Console
from lpvit_cli.errors import CheckFailed
from lpvit_cli.models.folder import load_model
from lpvit_cli.recipe import Recipe
from lpvit_cli.sparse import sparse_layers
from lpvit_cli.sparse.masks import require_nested

SMALL = [
    "model.weights=null",
    "model.kwargs={img_size: 32, patch_size: 8, embed_dim: 64, depth: 1, num_heads: 2, num_classes: 10}",
    "data.dataset=synthetic",
    "data.val_split=train",
    "data.batch_size=16",
    "data.workers=0",
    "calibrate.images=32",
    "prune.block=[16,16]",
    "prune.reweigh=0",
    "finetune.epochs=2",
    "finetune.rank=4",
    "finetune.lr=0.01",
    "finetune.init_batches=1",
    "schedule=[0.3,0.6]",
    "bench.batch_sizes=[1]",
    "bench.rounds=6",
    "bench.warmup_seconds=0",
    "bench.energy.window_seconds=0.5",
]
OPTIONS = [option for change in SMALL for option in ("--set", change)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interrupted in the midst of the second step, then gone on with, to the end of `lpvit run`."""
    folder = tmp_path_factory.mktemp("gradual") / "run"

    def interrupt(self: Console, what: str, done: int, total: int, detail: str) -> None:
        if what == "[2/2, 0.6] recovering":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Console, "progress", interrupt)
        assert run_cli("run", "digits_vit", "-o", folder, *OPTIONS).code == 130
    assert not (folder / "gradual").exists()
    result = run_cli("run", "digits_vit", "-o", folder, *OPTIONS)
    assert result.code == 0, result.err
    assert "[1/2, 0.3]" not in result.err, "the first step was done"
    assert "[2/2, 0.6] calibrating" not in result.err
    assert "[2/2, 0.6] recovering" in result.err
    return folder


def report(run: Path, stage: str) -> dict:  # type: ignore[type-arg]
    content: dict = json.loads((run / stage / "report.json").read_text())  # type: ignore[type-arg]
    return content


def test_what_is_gone_stays_gone_and_more_goes(run: Path) -> None:
    steps = report(run, "gradual")["steps"]
    assert [step["budget"] for step in steps] == [0.3, 0.6]
    assert [1 - step["pruned"]["linear_kept_fraction"] for step in steps] == pytest.approx([0.3, 0.6], abs=0.03)
    first, last = (sparse_layers(load_model(run / "gradual" / step["folder"])) for step in steps)
    assert first.keys() == last.keys()
    for name, layer in first.items():
        before, after = layer.weight.block_mask, last[name].weight.block_mask
        assert not (after & ~before).any(), f"{name}: a removed block came back"


def test_each_step_is_measured_against_the_dense_model(run: Path) -> None:
    made = report(run, "gradual")
    dense = made["steps"][0]["pruned"]["accuracy_dense"]
    for step in made["steps"]:
        assert step["pruned"]["accuracy_dense"] == step["recovered"]["accuracy_dense"] == dense
        assert step["recovered"]["accuracy"]["top1"] >= step["pruned"]["accuracy"]["top1"]
    assert (run / "gradual" / "gradual.svg").read_text().startswith("<svg")


def test_bench_and_export_take_the_last_model(run: Path) -> None:
    last = report(run, "gradual")["steps"][-1]
    assert report(run, "bench")["model"] == report(run, "export")["model"] == "gradual"
    assert report(run, "bench")["flops"] == last["pruned"]["flops"]
    assert report(run, "export")["accuracy_model"] == last["recovered"]["accuracy"]
    again = run_cli("run", "digits_vit", "-o", run, *OPTIONS)
    assert "gradual: up to date" in again.err
    result = run_cli("evaluate", run, "--json")
    assert json.loads(result.out)["accuracy"] == last["recovered"]["accuracy"]


def test_only_models_are_kept_of_the_steps(run: Path) -> None:
    assert [path.name for path in run.iterdir() if path.name.startswith(".gradual")] == []
    assert sorted(path.name for path in (run / "gradual" / "0.3").iterdir()) == ["config.json", "model.safetensors"]
    whole = load_file(run / "gradual" / "model.safetensors")
    assert sum(t.numel() for name, t in whole.items() if name.endswith(".values")) < 0.5 * 64 * 64 * 12
    assert all(bool(torch.isfinite(t).all()) for t in whole.values() if t.is_floating_point())


def test_classes_keep_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpvit_cli.stages.prune.class_names", lambda source: list("abcdefghij"))
    result = run_cli(
        "gradual", "digits_vit", "-o", tmp_path / "run", *OPTIONS, "--set", "schedule=[0.3]", "--set", "finetune.epochs=1"
    )
    assert result.code == 0, result.err
    assert load_model(tmp_path / "run" / "gradual").pretrained_cfg["label_names"] == list("abcdefghij")


def test_the_teacher_stays_the_dense_model() -> None:
    recipe = Recipe.load("digits_vit", ["schedule=[0.3,0.6]"])
    later = recipe.model.model_copy(update={"weights": Path("/later.safetensors")})
    step = recipe.step(later, 0.6, None)
    assert step.finetune.distill.teacher == recipe.model
    assert (step.model.weights, step.prune.budget.sparsity, step.schedule) == (Path("/later.safetensors"), 0.6, ())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("schedule=[0.6,0.3]", "each sparsity must leave less than the one before: [0.3, 0.6]"),
        ("schedule=[0.3,0.3]", "each sparsity must leave less"),
        ("schedule=[0.3,1.5]", "less than 1"),
        ("prune.patterns=[heads]", "no patterns: they may bring back blocks"),
        ("prune.patterns=[balanced]", "no patterns: they may bring back blocks"),
        ("prune.block=[[16,16],[32,32]]", "one block shape"),
        ("prune.budget.max_drop=1", "a budget other than max_drop"),
        ("finetune=null", "pruning by steps needs recovery"),
        ("schedule=[]", "schedule: no budgets given"),
    ],
)
def test_schedules_that_cannot_be_followed(tmp_path: Path, change: str, said: str) -> None:
    result = run_cli("gradual", "digits_vit", "-o", tmp_path / "run", *OPTIONS, "--set", change)
    assert result.code == 2
    assert said in result.err


def test_a_block_that_came_back_is_found() -> None:
    half, less, whole = torch.tensor([[True, False]]), torch.tensor([[False, False]]), torch.ones(1, 1, dtype=torch.bool)
    require_nested([{"a": whole}, {"a": half}, {"a": less}])
    for later in (torch.tensor([[True, True]]), torch.tensor([[False, True]]), whole):
        with pytest.raises(CheckFailed, match="removed blocks of a came back in a later step"):
            require_nested([{"a": half}, {"a": later}])
