"""An image as a model wants it: its own preprocessing, or timm's augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data import create_transform, resolve_model_data_config
from torch import nn

from lpvit_cli.data.pixels import MODES, UNREADABLE, ModelImage, read_picture
from lpvit_cli.errors import EnvironmentFault, ForeignImage, UsageError
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.recipe.finetune import Augment


def channels_of(model: VisionModel) -> int:
    channels: int = model.pretrained_cfg["input_size"][0]
    return channels


def turns(model: VisionModel) -> bool:
    """Whether the model is for photographs that are turned as their EXIF orientation says."""
    return bool(model.pretrained_cfg.get("exif"))


def transform_for(model: nn.Module, augment: Augment | None = None) -> Any:
    """The model's own preprocessing, or timm's augmentation: what `read_picture` gives -> [channels, H, W] float32, normalised.

    timm's steps work on Pillow images, and but for the operations on colours on tensors of any number of channels.
    """
    config = resolve_model_data_config(model)
    colours = config["input_size"][0] in MODES
    if not colours and config["crop_mode"] == "border":
        raise UsageError("model.preprocess: crop_mode border needs images of 1 or 3 channels", "use another model")
    if augment is None:
        return create_transform(**config, is_training=False)
    if not colours and augment.rand_augment:
        raise UsageError(
            f"finetune.augment.rand_augment: is of colours, and the model takes {config['input_size'][0]} channels",
            "--set finetune.augment.rand_augment=null",
        )
    return create_transform(
        **config,
        is_training=True,
        auto_augment=augment.rand_augment,
        color_jitter=0.4 if colours else 0.0,
        hflip=augment.flip,
        re_prob=augment.erasing,
        re_mode="pixel",
    )


def read_image(path: Path, channels: int = 3, exif: bool = False) -> ModelImage:
    """An image file for a model of that many channels. Raises UsageError or EnvironmentFault, naming the file."""
    try:
        return read_picture(path.open("rb"), channels, exif)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such image", "check the path") from error
    except ForeignImage as error:
        raise ForeignImage(f"{path}: {error.message}", error.hint) from error
    except UNREADABLE as error:
        raise EnvironmentFault(f"{path}: not a readable image", "give a PNG, JPEG or another format Pillow reads") from error
