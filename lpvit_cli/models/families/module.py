"""Your own modules: `module:package.module:function` is imported and called with the recipe's `kwargs`. This runs its code."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from lpvit_cli.errors import LpvitError, UsageError
from lpvit_cli.models.families.wrapper import WRONG_TASK, Wrapper, give_once, pick, require_shape
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.models.tensors import _load_strictly, read_tensors
from lpvit_cli.recipe.code import TRUST, allow_code, is_allowed
from lpvit_cli.recipe.model import MODULE, FeaturesKind, ModelSection, TaskKind

PREFIX = MODULE
DEFAULT = {
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
}


def build(section: ModelSection, task: TaskKind, features: FeaturesKind) -> VisionModel:
    """The model that the function makes, in eval mode on the CPU, its weights its own unless the recipe names some.

    Raises UsageError where the code does not give a model, or the recipe does not say enough of it.
    """
    if section.pretrained:
        raise UsageError(
            "model.pretrained: nobody knows weights of your own module", "load them in its function, or give weights: FILE"
        )
    architecture, kwargs = resolve(section)
    allow_code(architecture)  # whoever asks for it by name wants it to run
    made = _called(architecture, kwargs)
    told = {**DEFAULT, **(getattr(made, "pretrained_cfg", None) or {})}
    size = section.preprocess.input_size or told.get("input_size")
    if size is None:
        raise UsageError(
            "model.preprocess.input_size: lpvit cannot know the size of images that your own module takes",
            "set model.preprocess.input_size: [3, 224, 224] in a recipe, or its pretrained_cfg['input_size']",
        )
    output = pick(give_once(made.eval(), size), section.output)
    classes = _classes(made, kwargs, output, task)
    gives = "logits" if classes else features
    require_shape(output, gives)
    if classes and output.shape[1] != classes:
        raise UsageError(f"model.kwargs.num_classes: {classes}, but the model gives {output.shape[1]} numbers", WRONG_TASK)
    model = Wrapper(made, section.output, gives, classes).eval()
    model.pretrained_cfg = {**told, "input_size": tuple(size)}
    if section.weights:  # named as the module does, or as a model folder of lpvit
        tensors = read_tensors(section.weights)
        _load_strictly(model if tensors.keys() == model.state_dict().keys() else made, tensors, section.weights)
    return model


def resolve(section: ModelSection) -> tuple[str, dict[str, Any]]:
    """The path of the function, and what it is called with."""
    return section.name.removeprefix(PREFIX), section.kwargs


def create(config: Mapping[str, Any]) -> VisionModel:
    """The model of a config.json, by the same function. Raises UsageError unless a recipe, or the user, allows its code."""
    path = config["architecture"]
    if not is_allowed(path):
        raise UsageError(
            f"this model folder was made with code of yours, {path}, and opening a folder runs no code by itself",
            f"if you trust that code, set {TRUST}=1 (in Python: load_model(folder, trust_code=True))",
        )
    return Wrapper(_called(path, config["kwargs"]), config.get("output"), config["gives"], config["num_classes"]).eval()


def shrink(section: ModelSection) -> tuple[str, dict[str, Any]]:
    """As it is: only its author knows what is small."""
    return section.name, section.kwargs


def _classes(made: nn.Module, kwargs: Mapping[str, Any], output: Tensor, task: TaskKind) -> int:
    """How many classes it tells apart; 0: it gives embeddings."""
    if task == "features":
        return 0
    told = kwargs.get("num_classes", getattr(made, "num_classes", None))
    if isinstance(told, int):
        return told
    if task == "classification":
        return output.shape[-1]
    raise UsageError(
        "task: your own module does not say whether it gives logits or embeddings",
        "--set task=classification or --set task=features in a recipe, or give it num_classes (0: it gives embeddings)",
    )


def _called(path: str, kwargs: Mapping[str, Any]) -> nn.Module:
    function = _imported(path)
    _require_arguments(path, function, kwargs)
    try:
        made = function(**kwargs)
    except LpvitError:
        raise
    except (Exception, SystemExit) as error:  # any code may run here
        raise UsageError(f"model.name: {path} raised {_reason(error)}", "correct it, or model.kwargs") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"model.name: {path} returns a {type(made).__name__}, no torch.nn.Module", "return the model")
    if not any(isinstance(module, nn.Linear) for module in made.modules()):
        raise UsageError(f"model.name: the model of {path} has no linear layers to prune", "choose another")
    return made


def _imported(path: str) -> Callable[..., Any]:
    where, _, name = path.partition(":")
    if not where or not name:
        raise UsageError(f"model.name: {PREFIX}{path} names no function", f"write {PREFIX}package.module:function")
    try:
        found = getattr(importlib.import_module(where), name, None)
    except (Exception, SystemExit) as error:  # any code may run here
        raise UsageError(
            f"model.name: cannot import {where}: {_reason(error)}",
            "install it, put it beside the recipe, or add its folder to PYTHONPATH",
        ) from error
    if not callable(found):
        raise UsageError(f"model.name: {where} has no function {name!r}", "check its spelling")
    return found


def _require_arguments(path: str, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(function).bind(**kwargs)
    except ValueError:  # written in C
        return
    except TypeError as error:
        raise UsageError(
            f"model.kwargs: {path}{inspect.signature(function)}: {error}", "give them: --set model.kwargs.NAME=VALUE"
        ) from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no details'}"
