"""The other model of `evaluate --reference`: any that lpvit can open, or the dense one that a model folder remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.export.opening import LATEST, open_model
from lpvit_cli.files import reason
from lpvit_cli.models.build import build_model
from lpvit_cli.models.config_file import read_config
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.recipe.code import is_allowed
from lpvit_cli.recipe.model import MODULE, ModelSection
from lpvit_cli.recovery.objective import Teacher

DENSE = "dense"  # as a reference: what the model was pruned from


def reference_of(model: VisionModel, model_name: str, name: str) -> Teacher:
    """The model to compare `model` with, which takes the same pixels. Raises UsageError where it is of another kind."""
    other = dense_parent(model_name) if name == DENSE else open_model(name)[0]
    kinds = [(one.gives, one.num_classes, one.pretrained_cfg["input_size"][0]) for one in (model, other)]
    said = [
        f"{gives} of {f'{classes} classes' if classes else 'features'} for {channels} channels"
        for gives, classes, channels in kinds
    ]
    if kinds[0] == kinds[1]:
        reference = Teacher(other, model)
        if (shapes := [_shape(one, model) for one in (model, reference)])[0] == shapes[1]:
            return reference
        said = [f"{gives} of {' x '.join(map(str, shape))}" for (gives, _, _), shape in zip(kinds, shapes, strict=True)]
    raise UsageError(
        f"--reference {name}: cannot be compared: {' and '.join(said)}",
        "give a model of the same kind, such as dense: the one that a pruned model was made of",
    )


def _shape(model: Any, like: VisionModel) -> tuple[int, ...]:
    """Of what it gives for an image of `like`'s."""
    with torch.inference_mode():
        return tuple(model.eval()(torch.zeros(1, *like.pretrained_cfg["input_size"])).shape[1:])


def dense_parent(name: str) -> VisionModel:
    """The dense model of a model or run folder. Raises UsageError where nobody remembers it."""
    folder = Path(name)
    if not (folder / "config.json").is_file():
        folder = next((folder / one for one in LATEST if (folder / one / "config.json").is_file()), folder)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--reference {DENSE}: {name} is no model folder, and does not remember what it was made of",
            "evaluate the model folder, such as runs/NAME/finetuned, or name the dense model",
        )
    config = read_config(folder)
    parent, passed = config.get("parent"), set[str]()
    while isinstance(parent, str) and parent not in passed:  # of a recovered model: the pruned one
        passed.add(parent)
        if not (Path(parent) / "config.json").is_file():
            raise UsageError(
                f"--reference {DENSE}: {folder} was made of {parent}, which is not there",
                "put it back, or name the dense model",
            )
        parent = read_config(Path(parent)).get("parent")
    if not isinstance(parent, dict):
        raise UsageError(f"--reference {DENSE}: {folder} does not say what it was made of", "name the dense model")
    try:
        section = ModelSection.model_validate(parent)
    except ValidationError as error:
        raise EnvironmentFault(f"{folder / 'config.json'}: parent: {reason(error)}", "name the dense model instead") from error
    if section.name.startswith(MODULE) and not is_allowed(section.name.removeprefix(MODULE)):
        raise UsageError(
            f"--reference {DENSE}: {folder} names code of yours, {section.name}", "trust it: LPVIT_TRUST_MODULES=1 lpvit ..."
        )
    gives = config.get("gives", "logits")
    return build_model(section) if gives == "logits" else build_model(section, "features", gives)
