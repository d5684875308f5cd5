"""Models whose fused attention torch cannot write as ONNX are written with plain attention, and give the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from helpers import relative
from torch import Tensor, nn

from lpvit_cli.errors import CheckFailed
from lpvit_cli.export.graph import dense_graph, save_onnx
from lpvit_cli.models.attention import unfused
from lpvit_cli.models.build import build_model
from lpvit_cli.recipe.model import ModelSection

BEIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 5}
SWIN = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4, "num_labels": 5}
HIERA = {"img_size": 64, "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1), "num_classes": 5}
MODELS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": BEIT,
    "hiera_tiny_224": HIERA,
    "transformers:SwinForImageClassification": SWIN,
}


def model_of(name: str) -> Any:
    if name.startswith("transformers:"):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = build_model(ModelSection(name=name, kwargs=MODELS[name]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(model: Any) -> Tensor:
    return torch.randn(3, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_plain_attention_gives_the_same(name: str) -> None:
    model = model_of(name)
    plain, x = unfused(model), images(model)
    assert plain is not None
    assert unfused(plain) is None, "it has no fused attention left"
    assert relative(plain(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "transformers:SwinForImageClassification"])
def test_a_file_is_written_and_gives_the_same(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    x, before = images(model), copy.deepcopy(model)
    save_onnx(dense_graph(model, 20), tmp_path / "model.onnx", {})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (written,) = session.run(None, {"images": x.numpy()})
    assert relative(torch.from_numpy(written), model(x)) < 1e-5
    assert torch.equal(model(x), before(x)), "the model itself stays as it is"


def test_what_cannot_be_written_either_way_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(model: nn.Module, *args: Any, **more: Any) -> None:
        tried.append(model)
        raise RuntimeError(f"attempt {len(tried)}")

    monkeypatch.setattr("torch.onnx.export", refuse)
    with pytest.raises(CheckFailed, match="RuntimeError: attempt 2"):
        dense_graph(model_of("beit_base_patch16_224"), 20)
    with pytest.raises(CheckFailed, match="RuntimeError: attempt 3"):
        dense_graph(nn.Linear(3, 4), 20, example=torch.randn(1, 3))
    assert len(tried) == 3
