"""Random models, weights and statistics, the one measure of numerical error that the tests use, commands in this process."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lpvit_cli.curvature import LayerStatistics

# the server that Python 3.11 starts does not take over sys.path, and would import nothing of the tests
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
FRESH = multiprocessing.get_context("forkserver")  # forked of this one, whose OpenMP has run, processes would wait for ever
FRESH.set_forkserver_preload(["warm"])

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
SWIN = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 32,
    "depths": (2, 2),
    "num_heads": (4, 8),
    "mlp_ratio": 2.0,
    "num_classes": 5,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit with normalised queries and keys": ("vit_tiny_patch16_224", {**VIT, "qk_norm": True}),
    "vit without a qkv bias": ("vit_tiny_patch16_224", {**VIT, "qkv_bias": False, "proj_bias": False}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),  # the second block of a stage shifts its windows
}


def random_model(which: str) -> nn.Module:
    """One of MODELS. Weights, biases, norms and tables of position biases are all random, so that none can be left out."""
    name, kwargs = MODELS[which]
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    return model.eval()


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in float64."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def random_statistics(out: int, columns: int, tokens: int = 170, images: int = 10, seed: int = 0) -> LayerStatistics:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    d = torch.randn(tokens, out, generator=generator) * torch.rand(out, generator=generator)
    weighted = (x * d.square().sum(dim=1, keepdim=True)).T @ x
    return LayerStatistics(x.T @ x, d.T @ d, d.T @ x, weighted, tokens=tokens, images=images)


def masked(shape: tuple[int, int], block: tuple[int, int], density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random weight and a random block mask."""
    generator = torch.Generator().manual_seed(seed)
    grid = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    return torch.randn(shape, generator=generator), torch.rand(grid, generator=generator) < density


def expanded(mask: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    return mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Demo:
    """A finished run of the demo, the options it was run with, and what it printed."""

    folder: Path
    options: list[str]
    result: Result


def run_cli(*args: object) -> Result:
    """`lpvit ARGS` in this process."""
    from lpvit_cli.cli import app

    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            app([str(a) for a in args], standalone_mode=True)
        except SystemExit as exit:
            code = int(exit.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def copy_run(source: Path, target: Path, *names: str, without: str = "export") -> Path:
    """A copy of a run folder: of what is named, or all but `without`."""
    target.mkdir()
    for item in source.iterdir():
        if item.name in names or (not names and item.name != without):
            (shutil.copytree if item.is_dir() else shutil.copy2)(item, target / item.name)
    return target
