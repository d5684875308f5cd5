"""Dense models of every family, by the name a recipe gives them, and what they give: logits or embeddings."""

from __future__ import annotations

from typing import Any

from torch import nn

from lpvit_cli.errors import UsageError
from lpvit_cli.models.families import timm
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.recipe.model import FeaturesKind, ModelSection, TaskKind


def build_model(section: ModelSection, task: TaskKind = "auto", features: FeaturesKind = "pooled") -> VisionModel:
    """The dense model of a recipe for its task, in eval mode on the CPU; its preprocessing is in `model.pretrained_cfg`.

    With task `auto` a model with a head gives logits, one without gives embeddings; `features` takes a head away.
    Raises UsageError (unknown model or argument, no head to classify by), EnvironmentFault (weights not to be had, unreadable,
    foreign).
    """
    model = timm.build(section)
    if task == "classification" and model.num_classes == 0:
        raise UsageError(
            f"task: classification needs a model with a head, and {section.name!r} has none",
            "--set task=features, or give weights with a head and --set model.kwargs.num_classes=N",
        )
    give(model, features if task == "features" or model.num_classes == 0 else "logits")
    return model


def give(model: Any, output: str) -> None:
    """Make the model, in place, give its `logits`, or without a head its `pooled` embedding or all `tokens`.

    Raises UsageError where the architecture cannot give its tokens.
    """
    if output == "pooled" and model.num_classes:
        model.reset_classifier(0)
    if output == "tokens":
        try:
            model.reset_classifier(0, "")
        except (TypeError, AssertionError, AttributeError) as error:
            raise UsageError(
                f"features: tokens: {type(model).__name__} cannot give all its tokens", "use --set features=pooled"
            ) from error
    model.gives = output


def resolve(section: ModelSection) -> tuple[str, dict[str, Any]]:
    """The architecture and the arguments that build it: of a model from the hub, without the hub."""
    return timm.resolve(section)


def shrink(section: ModelSection) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the same architecture with little depth and small images, for smoke runs."""
    return timm.shrink(section)


def create(architecture: str, kwargs: dict[str, Any], output: str) -> VisionModel:
    """An architecture with random weights, as a model folder tells it."""
    model: Any = timm.create(architecture, kwargs, pretrained=False)
    give(model, output)
    assert isinstance(model, nn.Module)
    return model  # type: ignore[return-value]
