"""Dense models of every family, by the name a recipe gives them, and what they give: logits or embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from lpvit_cli.errors import UsageError
from lpvit_cli.files import reason
from lpvit_cli.models.config_file import PREPROCESSING, Preprocessing, require_valid
from lpvit_cli.models.families import module, timm, transformers
from lpvit_cli.models.families.wrapper import Wrapper, give_once, require_shape
from lpvit_cli.models.order import gather_at
from lpvit_cli.models.protocol import Family, VisionModel
from lpvit_cli.models.tensors import orders_beside, require_finite
from lpvit_cli.recipe.model import FeaturesKind, ModelSection, TaskKind

FAMILIES: dict[str, Family] = {"timm": timm, "transformers": transformers, "module": module}  # as config.json names them


def build_model(section: ModelSection, task: TaskKind = "auto", features: FeaturesKind = "pooled") -> VisionModel:
    """The dense model of a recipe for its task, in eval mode on the CPU; its preprocessing is in `model.pretrained_cfg`.

    With task `auto` a model with a head gives logits, one without gives embeddings; `features` takes a head away.
    Raises UsageError (unknown model or argument, no head to classify by, images of that size or outputs of that kind do not
    fit it: one black image goes through), EnvironmentFault (weights not to be had, unreadable,
    foreign; a package is missing).
    """
    with torch.random.fork_rng(devices=[]):  # weights that nobody gave are the same in every stage
        torch.manual_seed(0)
        model = FAMILIES[family_of(section.name)].build(section, task, features)
    for name, order in orders_beside(section.weights).items() if section.weights else ():
        gather_at(model, name, order)
    if task == "classification" and model.num_classes == 0:
        raise UsageError(
            f"task: classification needs a model with a head, and {section.name!r} has none",
            "--set task=features, or give weights with a head and --set model.kwargs.num_classes=N",
        )
    preprocess = {k: v for k, v in section.preprocess.model_dump().items() if v is not None}
    model.pretrained_cfg = {**model.pretrained_cfg, **preprocess}
    channels = model.pretrained_cfg["input_size"][0]
    for key in ("mean", "std"):
        if key in preprocess and len(preprocess[key]) not in (1, channels):
            raise UsageError(
                f"model.preprocess.{key}: has {len(preprocess[key])} values, the model takes {channels} channels",
                "give one for each channel, or one for all",
            )
        model.pretrained_cfg[key] = of_channels(model.pretrained_cfg[key], channels)
    if section.label_names is not None:
        if len(section.label_names) != model.num_classes:
            raise UsageError(
                f"model.label_names: {len(section.label_names)} names, the model tells {model.num_classes} classes apart",
                "give one name for each class",
            )
        model.pretrained_cfg["label_names"] = section.label_names
    _require_preprocessing(model)
    require_shape(give_once(model, model.pretrained_cfg["input_size"]), model.gives)
    require_finite(model.named_parameters(), section.weights or section.name)
    return model


def _require_preprocessing(model: VisionModel) -> None:
    """Raise UsageError where a model folder could not say how images are prepared."""
    try:
        require_valid(Preprocessing, {key: value for key, value in model.pretrained_cfg.items() if key in PREPROCESSING})
    except ValueError as error:
        raise UsageError(f"model: its preprocessing does not do: {reason(error)}", "set it: model.preprocess") from error


def of_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A mean or deviation for each channel: as it is given, or the average for all where it is of another number of them."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def without_head(model: Any) -> VisionModel:
    """A model of logits that gives pooled embeddings instead; the one given may be changed. Raises UsageError where nobody
    knows how to take its head away."""
    if isinstance(model, transformers.TransformersModel):
        return transformers.without_head(model)
    inner: Any = model.model if isinstance(model, Wrapper) else model
    if not hasattr(inner, "reset_classifier") or getattr(model, "output", None) is not None:
        raise UsageError("this model gives logits, and its embeddings cannot be reached", "make it with --set task=features")
    inner.reset_classifier(0)
    model.num_classes, model.gives = 0, "pooled"
    return cast(VisionModel, model)


def family_of(name: str) -> str:
    """The family of a `model.name`, by its prefix: timm's names have none."""
    return next((key for key, family in FAMILIES.items() if family.PREFIX and name.startswith(family.PREFIX)), "timm")


def resolve(section: ModelSection) -> dict[str, Any]:
    """What config.json says of the model of a recipe: family, architecture, kwargs, and which output is taken."""
    family = family_of(section.name)
    architecture, kwargs = FAMILIES[family].resolve(section)
    return {
        "family": family,
        "architecture": architecture,
        "kwargs": kwargs,
        **({} if section.output is None else {"output": section.output}),
    }


def shrink(section: ModelSection) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the same architecture with little depth and small images, for smoke runs."""
    return FAMILIES[family_of(section.name)].shrink(section)


def create(config: Mapping[str, Any]) -> VisionModel:
    """The architecture of a config.json with random weights and its preprocessing."""
    family = config.get("family", "timm")
    if family not in FAMILIES:
        raise ValueError(f"config.json: no family of models is called {family!r}")
    model = FAMILIES[family].create(config)
    model.pretrained_cfg = {**model.pretrained_cfg, **config["preprocessing"]}
    return model


def name_of(config: Mapping[str, Any]) -> str:
    """The architecture of a config.json as a recipe's `model.name`."""
    return f"{FAMILIES[config.get('family', 'timm')].PREFIX}{config['architecture']}"
