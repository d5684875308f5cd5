"""Layers that lost every block: two on one input are alike, and each has to be found in the graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import relative
from torch import Tensor, nn

import lpvit_cli as lpvit
from lpvit_cli.sparse import sparsify


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q", "k", "v")})  # a name that exporters use too

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.model[name](x) for name in ("q", "k", "v"))
        return (q @ k.transpose(1, 2)).softmax(-1) @ v


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_queries_and_keys_that_are_gone(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    model, gone = Attention().eval(), torch.zeros(2, 2, dtype=torch.bool)
    x = torch.randn(2, 5, 8)
    for name in ("q", "k"):
        nn.init.zeros_(model.model[name].bias)
    sparsify(model, {"model.q": gone, "model.k": gone, "model.v": torch.eye(2) > 0}, (4, 4))
    written = lpvit.export_onnx(model, x, tmp_path / "m.onnx", form="rows", precision=precision)
    assert set(written.forms) == {"model.q", "model.k", "model.v"}
    assert written.relative_error < (1e-6 if precision == "float32" else 1e-2)
    expected = model.model["v"](x).mean(dim=1, keepdim=True).expand(-1, 5, -1)
    assert relative(model(x), expected) < 1e-6
