"""What lpvit asks of a model, and of a family of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from lpvit_cli.recipe.model import FeaturesKind, ModelSection, TaskKind


class VisionModel(nn.Module):
    """What every timm model has besides being a module; for the type checker, and for models that are not timm's."""

    num_classes: int  # 0: no head, it gives embeddings
    gives: str  # logits [n, classes], pooled [n, features] or tokens [n, tokens, features]
    pretrained_cfg: dict[str, Any]  # preprocessing: input_size (C, H, W), mean, std, interpolation, crop_pct ...


class Family(Protocol):
    """A place where models come from: one module of models/families, its functions.

    `architecture` and `kwargs` are what config.json says of a model: they build it again without the recipe, the hub, or a
    path of this machine. With the family's prefix before it, the architecture is a `model.name` too.
    """

    PREFIX: str  # of model.name

    def build(self, section: ModelSection, task: TaskKind, features: FeaturesKind) -> VisionModel:
        """The model of a recipe with its weights, in eval mode on the CPU."""

    def resolve(self, section: ModelSection) -> tuple[str, dict[str, Any]]:
        """Architecture and kwargs of the model of a recipe."""

    def create(self, config: Mapping[str, Any]) -> VisionModel:
        """The model of a config.json, with random weights; the caller adds the preprocessing."""

    def shrink(self, section: ModelSection) -> tuple[str, dict[str, Any]]:
        """Name and kwargs of the same architecture with little depth and small images, for smoke runs."""
