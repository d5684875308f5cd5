"""Texts that go with exported files: jinja2 templates beside this module, and a model's preprocessing in words."""

from __future__ import annotations

from math import floor
from pathlib import Path
from typing import Any

import jinja2
import torch
from timm.data import resolve_model_data_config
from torch import nn

from lpvit_cli.models.protocol import VisionModel


def document(template: str, **values: Any) -> str:
    """The text of TEMPLATE.jinja; a value that is missing is a bug and raises."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{template}.jinja").render(**values)


def output_name(model: nn.Module) -> str:
    """What an exported file calls its output: logits or features."""
    gives = getattr(model, "gives", "logits" if getattr(model, "num_classes", 1) else "pooled")
    return "logits" if gives == "logits" else "features"


def output_size(model: VisionModel) -> tuple[int, ...]:
    """The shape of what the model gives for one image."""
    with torch.inference_mode():
        return tuple(model(torch.zeros(1, *model.pretrained_cfg["input_size"])).shape[1:])


def preprocessing_steps(model: VisionModel) -> list[str]:
    """What lpvit does to an image (timm's evaluation transform), one sentence a step."""
    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    tall, wide = (floor(side / config["crop_pct"]) for side in (height, width))
    by = f"{config['interpolation']}, antialiased as in Pillow"
    resize = {
        "squash": f"Resize to {tall} x {wide} pixels (height x width; {by}), whatever the shape of the image was.",
        "border": f"Resize until the image just fits into {tall} x {wide} pixels (height x width; {by}), keeping its shape.",
    }
    keep = (
        f"Resize the shorter side to {tall} pixels ({by}), keeping the shape of the image."
        if tall == wide
        else f"Resize until the image just covers {tall} x {wide} pixels (height x width; {by}), keeping its shape."
    )
    fill = ", filling what is outside the image with the mean" if config["crop_mode"] == "border" else ""
    mean, std = (", ".join(f"{value:g}" for value in config[key]) for key in ("mean", "std"))
    kind = {1: "8-bit grey", 3: "8-bit RGB"}.get(channels, f"{channels} channels")
    order = ", in the order R, G, B" if channels == 3 else ""
    whole = "Divide by 255" if channels in (1, 3) else "Divide by the largest value of their type"
    return [
        f"Decode to {kind}.",
        resize.get(config["crop_mode"], keep),
        f"Crop the central {height} x {width} pixels (height x width){fill}.",
        f"{whole}: values from 0 to 1.",
        f"Subtract the mean {mean}, divide by the standard deviation {std}{' (each in the order R, G, B)' if order else ''}.",
        f"Lay out as float32 [{channels}, {height}, {width}]: channels first{order}.",
    ]
