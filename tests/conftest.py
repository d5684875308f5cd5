"""Small models and statistics that many tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from helpers import Demo, Result, run_cli
from torch import nn


@pytest.fixture(scope="session", autouse=True)
def _no_choices_of_this_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests tune is forgotten, and what the user has tuned does not change them."""
    os.environ["LPVIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny_vit() -> nn.Module:
    """Two blocks, 32 features, 17 tokens, 5 classes; random weights, large enough to give gradients of order one."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    return model.eval()


@pytest.fixture
def lpvit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run `lpvit ARGS` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return run_cli


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The shipped demo in full, with half of its epochs and rounds: its folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    short = ["finetune.epochs=3", "bench.rounds=8", "bench.batch_sizes=[1,64]", "bench.energy.window_seconds=0.5"]
    options = [option for change in short for option in ("--set", change)]
    result = run_cli("run", "digits_vit", "-o", folder, *options)
    assert result.code == 0, result.err
    return Demo(folder, options, result)
