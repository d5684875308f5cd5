"""Merging tokens from the recipe to the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from helpers import run_cli

from lpvit_cli import Recipe, load_model
from lpvit_cli.models.build import build_model
from lpvit_cli.models.flops import count_flops
from lpvit_cli.tokens.blocks import merging_of

RECIPE = """
name: merging
device: cpu
model:
  name: vit_tiny_patch16_224
  kwargs: {img_size: 32, patch_size: 4, embed_dim: 32, depth: 3, num_heads: 2, num_classes: 5}
data: {dataset: synthetic, batch_size: 8, workers: 0, val_images: 24}
calibrate: {images: 24, batch_size: 8}
prune: {block: [16, 8], budget: {flops: 0.5}, reweigh: 0}
finetune: {epochs: 1, rank: 2, lr: 1.0e-4, warmup_epochs: 0, init_batches: 1, distill: {weight: 1.0}}
bench: {batch_sizes: [1], rounds: 6, warmup_seconds: 0, energy: {window_seconds: 0.1}}
profile: {rounds: 6}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merging") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    folder = recipe.parent / "run"
    ran = run_cli("run", recipe, "-o", folder, "--set", "tokens.flops=0.7")
    assert ran.code == 0, ran.err
    return folder


def report(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def dense(recipe: Path) -> Any:
    loaded = Recipe.load(recipe)
    return build_model(loaded.model, loaded.task, loaded.features)


def test_the_budget_counts_from_the_model_that_merges_nothing(recipe: Path, run: Path) -> None:
    pruned, model = report(run / "pruned"), load_model(run / "pruned")
    merged, whole = pruned["merged"], count_flops(dense(recipe), ()).total
    assert pruned["flops_dense"] == whole
    assert merged["flops"] <= 0.7 * whole
    assert pruned["flops"] == pytest.approx(0.5 * whole, rel=0.02)
    assert merged["tokens"][0] == 65 > merged["tokens"][-1]
    assert merging_of(model) is not None
    assert pruned["accuracy_dense"]["top1"] == report(run / "finetuned")["accuracy_dense"]["top1"]


def test_late_layers_cost_less_and_power_follows(run: Path) -> None:
    layers = {layer["name"]: layer for layer in report(run / "pruned")["layers"]}
    assert layers["blocks.2.mlp.fc1"]["flops_dense"] < layers["blocks.0.mlp.fc1"]["flops_dense"]
    assert layers["blocks.2.mlp.fc1"]["energy_uj_dense"] < layers["blocks.0.mlp.fc1"]["energy_uj_dense"]
    assert not any("beta changes nothing" in note for note in report(run / "pruned")["notes"])


def test_recovery_keeps_merging(run: Path) -> None:
    assert merging_of(load_model(run / "finetuned")) == merging_of(load_model(run / "pruned"))


def test_the_file_merges_too_and_says_how_many_images_flip(run: Path) -> None:
    session = onnxruntime.InferenceSession(run / "export" / "model.onnx")
    model = load_model(run / "finetuned")
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ours = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        errors = (ours - model(images)).norm(dim=1) / model(images).norm(dim=1)
    assert float(errors.median()) < 1e-4
    (parity,) = report(run / "export")["files"][0]["parity"]
    assert parity["batch_size"] == 32
    assert parity["flipped"] <= 1 / 3
    assert "TopK" in {node.op_type for node in _graph(run / "export" / "model.onnx")}


def _graph(path: Path) -> Any:
    import onnx

    return onnx.load(path).graph.node


def test_auto_splits_a_budget_of_flops_and_says_so(recipe: Path) -> None:
    folder = recipe.parent / "auto"
    assert run_cli("calibrate", recipe, "-o", folder, "--set", "tokens=auto").code == 0
    calibrated = report(folder / "calibration")
    (note,) = [note for note in calibrated["notes"] if note.startswith("tokens: auto")]
    assert "nearest to the dense model on held-back images" in note
    assert all(share in note for share in ("100%", "88%", "75%"))
    assert note.count("%: ") == 4, "the most that merging can do stands for all that is more"
    assert run_cli("prune", recipe, "-o", folder, "--set", "tokens=auto").code == 0
    pruned = report(folder / "pruned")
    assert pruned["flops"] <= 0.51 * pruned["flops_dense"]
    assert (pruned["merged"] is None) == (calibrated["merging"] is None)


@pytest.fixture(scope="module")
def profile(recipe: Path) -> Path:
    """Of a device whose time is in proportion to the multiplications of the prunable layers."""
    folder, path = recipe.parent / "profiled", recipe.parent / "profile.json"
    assert run_cli("profile", recipe, "-o", folder).code == 0
    profile = report(folder / "profile")["profile"]
    for layer in profile["layers"]:
        layer["dense_ms"] = layer["rows"] * layer["shape"][0] * layer["shape"][1] * 1e-6
        for sparse in layer["sparse"]:
            sparse["ms"] = [kept * layer["dense_ms"] for kept in sparse["kept"]]
    profile["model_ms"] = sum(layer["dense_ms"] * len(layer["names"]) for layer in profile["layers"])
    path.write_text(json.dumps({key: value for key, value in profile.items() if not key.startswith("rest_")}))
    return path


@pytest.mark.parametrize("tokens", ["auto", "{flops: 0.7}"])
def test_milliseconds_follow_the_tokens(recipe: Path, profile: Path, tokens: str, tmp_path: Path) -> None:
    dense_ms = json.loads(profile.read_text())["model_ms"]
    target = 0.6 * dense_ms
    sets = [f"tokens={tokens}", f"prune.budget={{latency_ms: {target}}}", f"prune.profile={profile}"]
    for stage in ("calibrate", "prune"):
        ran = run_cli(stage, recipe, "-o", tmp_path / "run", *[word for one in sets for word in ("--set", one)])
        assert ran.code == 0, ran.err
    pruned = report(tmp_path / "run" / "pruned")
    assert pruned["latency_ms_dense"] == pytest.approx(dense_ms)
    assert pruned["latency_ms"] == pytest.approx(target, rel=0.05)
    assert pruned["latency_ms"] == pytest.approx(sum(layer["flops"] for layer in pruned["layers"]) / 2e6, rel=0.05)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["tokens.flops=0.1"], "tokens.flops: 0.1 cannot be reached"),
        (["tokens.fraction=0.6"], "tokens.fraction"),
        (["tokens={fraction: 0.2, after: [7]}"], "tokens.after: there is no block 7"),
        (["tokens={fraction: 0.2, flops: 0.7}"], "either flops or fraction"),
        (["tokens=auto", "prune.budget={sparsity: 0.5}"], "tokens: auto splits a budget of flops or latency_ms"),
        (
            ["tokens=auto", "prune.budget={flops: 0.01}"],
            "flops 0.01 cannot be reached: merging and weights can",
        ),
        (["tokens=auto", "sweep=[0.5, 0.4]"], "tokens: auto splits one budget"),
        (["tokens=0.7"], "tokens: should be auto, or {flops: ...}"),
        (["tokens.flops=2"], "tokens.flops: "),
    ],
)
def test_what_cannot_be_is_told_before_calibration(recipe: Path, tmp_path: Path, sets: list[str], message: str) -> None:
    ran = run_cli("calibrate", recipe, "-o", tmp_path / "run", *[word for one in sets for word in ("--set", one)])
    assert ran.code == 2
    assert message in " ".join(ran.err.split())
    assert not (tmp_path / "run" / "calibration").exists()


def test_a_budget_that_takes_nothing_away_merges_nothing(recipe: Path, tmp_path: Path) -> None:
    ran = run_cli("calibrate", recipe, "-o", tmp_path / "run", "--set", "tokens=auto", "--set", "prune.budget={flops: 1}")
    assert ran.code == 0, ran.err
    assert report(tmp_path / "run" / "calibration")["merging"] is None


def test_power_is_compared_with_the_model_that_merges_nothing(recipe: Path, run: Path, tmp_path: Path) -> None:
    assert run_cli("calibrate", recipe, "-o", tmp_path / "plain").code == 0
    assert run_cli("prune", recipe, "-o", tmp_path / "plain").code == 0
    plain, merged = report(tmp_path / "plain" / "pruned"), report(run / "pruned")
    assert merged["energy_uj_dense"] == pytest.approx(plain["energy_uj_dense"])
    assert merged["energy_uj_dense"] > sum(layer["energy_uj_dense"] for layer in merged["layers"])


def test_a_rehearsal_of_two_blocks_merges_what_it_can(tmp_path: Path) -> None:
    sets = ("--set", "tokens={flops: 0.5, after: [0, 2, 4]}")
    ran = run_cli("calibrate", "dinov2_small_50", "--smoke", "-o", tmp_path / "run", *sets)
    assert ran.code == 0, ran.err
    assert report(tmp_path / "run" / "calibration")["merging"]["fraction"] == 0.2
