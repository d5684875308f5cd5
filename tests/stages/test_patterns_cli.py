"""Patterns and block shapes through the commands, on the demo: budget, accuracy, recovery, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Demo, Result, copy_run, run_cli

from lpvit_cli import load_model
from lpvit_cli.models.folder import read_config
from lpvit_cli.sparse import sparse_layers

HEAD, NEURONS = 60, 60  # features of a head, neurons in a group: the blocks are 240 x 60
UNITS = {  # weights that go at a time, of 2 x 12 x 240^2
    "neurons": NEURONS * 2 * 240,
    "heads": HEAD * 4 * 240,
    "neurons,heads": HEAD * 4 * 240,
    "balanced": 960 * 60,  # a block of every block row of fc1
}
QUICK = ["prune.reweigh=0", "finetune.epochs=1", "finetune.init_batches=1"]


@pytest.fixture
def calibrated(demo: Demo, tmp_path: Path) -> Path:
    """A run folder that has the demo's calibration and nothing else."""
    return copy_run(demo.folder, tmp_path / "run", "recipe.yaml", "calibration")


def command(folder: Path, demo: Demo, what: str, *changes: str) -> Result:
    options = [option for change in (*QUICK, *changes) for option in ("--set", change)]
    return run_cli(what, "digits_vit", "-o", folder, *demo.options, *options, "--json")


def done(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.err
    return dict(json.loads(result.out))


def places(model: torch.nn.Module) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Shape and block positions of every sparse layer."""
    return {
        name: ([*layer.values.shape], layer.row_ptr.tolist(), layer.cols.tolist())
        for name, layer in sparse_layers(model).items()
    }


@pytest.mark.parametrize("patterns", UNITS)
def test_a_pattern_from_pruning_to_the_exported_file(calibrated: Path, demo: Demo, patterns: str) -> None:
    """Three quarters of the weights go: more than the MLPs hold. Of balanced ones fewer, or each block row is left with one."""
    kept, block = (0.6, "[60,60]") if patterns == "balanced" else (0.25, "[240,60]")
    changes = (f"prune.patterns=[{patterns}]", f"prune.budget.sparsity={1 - kept}", f"prune.block={block}")
    pruned = done(command(calibrated, demo, "prune", *changes))
    weights = 2 * 12 * 240**2
    assert 0 <= kept - pruned["linear_kept_fraction"] < UNITS[patterns] / weights
    evaluated = done(run_cli("evaluate", calibrated / "pruned", "--json"))
    assert evaluated["accuracy"] == pruned["accuracy"]

    model: Any = load_model(calibrated / "pruned")
    widths = [(block.attn.num_heads, block.mlp.fc1.out_features) for block in model.blocks]
    assert (min(heads for heads, _ in widths) < 4) is ("heads" in patterns)
    assert (min(neurons for _, neurons in widths) < 960) is ("neurons" in patterns)
    assert all(neurons % NEURONS == 0 for _, neurons in widths)
    for name, layer in sparse_layers(model).items():
        if patterns == "balanced":
            assert len(set(layer.row_ptr.diff().tolist())) == 1, name
        elif {"attn": "heads", "mlp": "neurons"}[name.split(".")[2]] in patterns:
            assert tuple(layer.values.shape) == (1, layer.out_features, layer.in_features), "no zeros are left behind"
    left = sum(layer.values.numel() for layer in sparse_layers(model).values())
    assert left / weights == pytest.approx(pruned["linear_kept_fraction"])
    if patterns not in ("neurons,heads", "balanced"):
        return

    finetuned = done(command(calibrated, demo, "finetune-lora-ga", *changes))
    assert finetuned["accuracy_pruned"] == pruned["accuracy"]
    recovered = load_model(calibrated / "finetuned")
    assert places(recovered) == places(model), "masks stay as they are"
    assert not torch.equal(
        next(iter(sparse_layers(recovered).values())).values, next(iter(sparse_layers(model).values())).values
    )
    exported = done(command(calibrated, demo, "export", *changes))
    (file,) = exported["files"]
    assert all(parity["agreement"] == 1 for parity in file["parity"])
    assert file["accuracy"]["top1"] == pytest.approx(finetuned["accuracy"]["top1"], abs=0.3)


def test_several_shapes_end_in_the_report_and_in_the_folder(calibrated: Path, demo: Demo) -> None:
    """Neither shape divides these layers."""
    changes = ("prune.block=[[128,32],[64,64]]", "prune.budget.flops=0.6")
    report = done(command(calibrated, demo, "prune", *changes))
    taken = {layer["name"]: layer["block"] for layer in report["layers"]}
    assert all(block in ([128, 32], [64, 64]) for block in taken.values())
    sparsity = read_config(calibrated / "pruned")["sparsity"]
    for layer in report["layers"]:
        whole = layer["kept_blocks"] == layer["blocks"]
        assert sparsity[layer["name"]]["block"] == (layer["shape"] if whole else taken[layer["name"]])
        assert sparsity[layer["name"]]["kept"] == (1 if whole else layer["kept_blocks"])
    blocks_below = sum(2 * 17 * block[0] * block[1] for block in taken.values()) / report["flops_dense"]
    assert 0 <= 0.6 - report["flops"] / report["flops_dense"] < blocks_below
    evaluated = done(run_cli("evaluate", calibrated / "pruned", "--json"))
    assert evaluated["accuracy"] == report["accuracy"]
    again = command(calibrated, demo, "prune", *changes)
    assert "up to date" in again.err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["prune.patterns=[neurons]", "prune.method=lpvit"], "patterns need method: obs"),
        (["prune.patterns=[neurons]", "prune.budget.latency_ms=1"], "a profile has no smaller layers"),
        (["prune.patterns=[neurons]", "prune.block=[240,50]"], "groups of 50 do not divide the 960 of blocks.0.mlp.fc2"),
        (["prune.block=[[60,60],[60,961]]"], "60x961 is larger than layer blocks.0.attn.qkv (720x240, out x in)"),
        (
            ["prune.budget.flops=0.01", "prune.min_keep=0.25"],
            "flops 0.01 cannot be reached: with min_keep 0.25 it can be from 0.2",
        ),
        (
            ["prune.budget.sparsity=0.99", "prune.min_keep=0.25"],
            "sparsity 0.99 cannot be reached: with min_keep 0.25 it can be from 0 to 0.7",
        ),
    ],
)
def test_what_pruning_cannot_do_is_told_and_leaves_nothing(calibrated: Path, demo: Demo, changes: list[str], told: str) -> None:
    result = command(calibrated, demo, "prune", *changes)
    assert result.code == 2
    assert told in json.loads(result.out)["error"]["message"]
    assert not (calibrated / "pruned").exists()


SMALL = ["model.weights=null", "data.dataset=synthetic", "calibrate.images=32", "prune.block=[16,8]", "device=cpu"]
VIT = "model.kwargs={img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 4, num_classes: 10}"
MIXER = (
    "model.name=mixer_s32_224",
    "model.kwargs={img_size: 64, num_classes: 10}",
    "prune.layers.include=['blocks.0.mlp_tokens.*']",
    "prune.block=[2,2]",
)


def small(folder: Path, what: str, *changes: str) -> Result:
    options = [option for change in (*SMALL, *changes) for option in ("--set", change)]
    return run_cli(what, "digits_vit", "-o", folder, *options, "--no-resume", "--json")


def test_a_model_without_heads_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done(small(folder, "calibrate", *MIXER))
    result = small(folder, "prune", *MIXER, "prune.patterns=[heads]")
    assert result.code == 2
    assert "no module of this model can lose heads" in json.loads(result.out)["error"]["message"]


def test_the_same_seed_writes_the_same_file(tmp_path: Path) -> None:
    def written(name: str, *changes: str) -> bytes:
        done(small(tmp_path / name, "calibrate", VIT, *changes))
        done(small(tmp_path / name, "prune", VIT, *changes))
        return (tmp_path / name / "pruned" / "model.safetensors").read_bytes()

    once, again, other = written("once"), written("again"), written("other", "seed=1")
    assert once == again
    assert once != other
