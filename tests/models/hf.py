"""Tiny checkpoints of transformers, as the hub has them: config.json and model.safetensors in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}
CLASSES: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": {**VIT, "num_labels": 5},
    "ViTModel": VIT,
    "DeiTForImageClassification": {**VIT, "num_labels": 5},
    "DeiTModel": VIT,
    "Dinov2ForImageClassification": {**DINO, "num_labels": 5},
    "Dinov2Model": {**DINO, "use_swiglu_ffn": True},
    "Dinov2WithRegistersModel": DINO,
    "DINOv3ViTModel": VIT,
    "SiglipVisionModel": VIT,
    "CLIPVisionModel": VIT,
    "CLIPVisionModelWithProjection": {**VIT, "projection_dim": 16},
    "BeitForImageClassification": {**VIT, "num_labels": 5, "use_relative_position_bias": True},
    "BeitModel": VIT,
    "SwinForImageClassification": {**SWIN, "num_labels": 5},
    "SwinModel": SWIN,
}


def theirs(architecture: str, **more: Any) -> Any:
    """The model of the library, all of its weights random: norms, LayerScales and tables of biases too."""
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**CLASSES.get(architecture, {}), **more}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def checkpoint(folder: Path, architecture: str, **more: Any) -> Path:
    theirs(architecture, **more).save_pretrained(folder)
    return folder


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))
