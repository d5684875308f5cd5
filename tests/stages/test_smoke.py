"""The shipped recipes take the whole path, with a small random model and generated images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import copy_run, run_cli

from lpvit_cli.stages import STAGES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "sequential", "width"),
    [
        ("deit_base_70", "true", "{embed_dim: 384, num_heads: 6}"),
        ("swin_tiny_77", "false", "{embed_dim: 48}"),
        ("dinov2_small_50", "true", "{embed_dim: 128, num_heads: 2}"),
    ],
    ids=["deit_base_70", "swin_tiny_77", "dinov2_small_50"],
)
def test_smoke(tmp_path: Path, recipe: str, sequential: str, width: str) -> None:
    options = ["--set", f"prune.sequential={sequential}", "--set", f"model.kwargs={width}"]
    result = run_cli("run", recipe, "--smoke", "-o", tmp_path / "run", *options, "--json")
    assert result.code == 0, result.err
    reports = json.loads(result.out)
    assert list(reports) == [stage.command for stage in STAGES]
    pruned = reports["prune"]
    if recipe == "dinov2_small_50":
        assert pruned["linear_kept_fraction"] == pytest.approx(0.5, abs=0.03)
        assert reports["export"]["quality_model"] == reports["finetune-lora-ga"]["quality"]
    elif recipe == "deit_base_70":
        assert pruned["linear_kept_fraction"] == pytest.approx(0.3, abs=0.002)
    else:
        assert pruned["flops"] / pruned["flops_dense"] == pytest.approx(0.77, abs=0.004)  # the last block is a large one
    assert (tmp_path / "run" / "export" / "model.onnx").is_file()


def test_a_parity_failure_is_exit_code_4_and_leaves_no_file(demo, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = copy_run(demo.folder, tmp_path / "run")
    options = [*demo.options, "--set", "export.tolerance=1e-12"]
    result = run_cli("export", "digits_vit", "-o", folder, *options, "--json")
    assert result.code == 4
    assert "disagrees with the model at batch 1" in json.loads(result.out)["error"]["message"]
    assert not [p.name for p in folder.iterdir() if "export" in p.name]
