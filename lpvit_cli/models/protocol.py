"""What lpvit asks of a model."""

from __future__ import annotations

from typing import Any

from torch import nn


class VisionModel(nn.Module):
    """What every timm model has besides being a module; for the type checker, and for models that are not timm's."""

    num_classes: int  # 0: no head, it gives embeddings
    gives: str  # logits [n, classes], pooled [n, features] or tokens [n, tokens, features]
    pretrained_cfg: dict[str, Any]  # preprocessing: input_size (C, H, W), mean, std, interpolation, crop_pct ...
