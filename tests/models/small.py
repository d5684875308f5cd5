"""A tiny ViT, dense and sparse, in memory and in a folder."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpvit_cli.errors import LpvitError
from lpvit_cli.models.build import build_model
from lpvit_cli.recipe.model import ModelSection

VIT = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5, "qkv_bias": False}
TINY = ModelSection(name=VIT, kwargs=KWARGS)
QKV, FC1, EMPTY = "blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2"
Tensors = dict[str, Tensor]


@functools.cache
def _tiny() -> nn.Module:
    torch.manual_seed(0)
    return build_model(TINY)


def tiny() -> nn.Module:
    """The same random weights every time."""
    return copy.deepcopy(_tiny())


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def outputs(model: nn.Module) -> Tensor:
    """Of a copy in fresh memory: tensors of a mapped file lie at odd addresses, where a sum may round differently."""
    return copy.deepcopy(model)(images())


def one_line(error: LpvitError) -> str:
    """The message, after checking that it is one a person can act on."""
    assert "\n" not in error.message
    assert "Traceback" not in error.message
    assert error.hint
    return error.message


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)
