"""Small models and statistics that many tests share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from filelock import FileLock
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
    """The shipped demo in full, with half of its epochs and rounds, not weighed anew: its folder, and what the command printed.

    Of several test processes the first makes it, and each has a copy.
    """
    own = tmp_path_factory.mktemp("demo")
    shared = own.parent.parent if "PYTEST_XDIST_WORKER" in os.environ else own.parent
    folder, printed = shared / "runs" / "demo", shared / "printed.json"
    short: dict[str, object] = {"finetune.epochs": 3, "prune.reweigh": 0, "bench.rounds": 8, "bench.batch_sizes": [1, 64]}
    short["bench.energy.window_seconds"] = 0.5
    options = [word for key, value in short.items() for word in ("--set", f"{key}={value}")]
    with FileLock(shared / "demo.lock"):
        if not printed.is_file():
            result = run_cli("run", "digits_vit", "-o", folder, *options)
            assert result.code == 0, result.err
            printed.write_text(json.dumps(asdict(result)))
    shutil.copytree(folder, own / "demo")
    return Demo(own / "demo", options, Result(**json.loads(printed.read_text())))
