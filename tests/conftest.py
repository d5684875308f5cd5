"""Small models and statistics that many tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from torch import nn


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


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def lpvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Run `lpvit ARGS` in this process, in an empty folder."""
    from lpvit_cli.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: object) -> Result:
        capsys.readouterr()
        try:
            code = app([str(a) for a in args], standalone_mode=True)
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return Result(int(code or 0), captured.out, captured.err)

    return run
