"""One image: read from a file, and prepared as a model wants it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.recipe.finetune import Augment

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for damaged images


def transform_for(model: nn.Module, augment: Augment | None = None) -> Any:
    """The model's own preprocessing, or timm's augmentation: PIL image -> [3, H, W] float32, normalised."""
    config = resolve_model_data_config(model)
    if augment is None:
        return create_transform(**config, is_training=False)
    return create_transform(
        **config,
        is_training=True,
        auto_augment=augment.rand_augment,
        hflip=augment.flip,
        re_prob=augment.erasing,
        re_mode="pixel",
    )


def read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such image", "check the path") from error
    except UNREADABLE as error:
        raise EnvironmentFault(f"{path}: not a readable image", "give a PNG, JPEG or another format Pillow reads") from error
