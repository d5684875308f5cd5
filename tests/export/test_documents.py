"""The preprocessing told to users of exported files, followed by hand, is what lpvit does."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from helpers import relative
from PIL import Image, ImageOps
from torch import nn

from lpvit_cli.data.transforms import transform_for
from lpvit_cli.export.documents import preprocessing_steps

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def followed(steps: list[str], image: Image.Image) -> torch.Tensor:
    """What somebody who reads `steps` would write."""
    width, height = image.size
    resampling = next(filter for name, filter in RESAMPLING.items() if name in steps[1])
    sides = [int(side) for side in re.findall(r"\b\d+\b", steps[1])]
    if "shorter side" in steps[1]:
        scale = sides[0] / min(width, height)
    elif "just covers" in steps[1]:
        scale = max(sides[0] / height, sides[1] / width)
    else:
        scale = min(sides[0] / height, sides[1] / width)
    size = sides[::-1] if "whatever the shape" in steps[1] else [round(width * scale), round(height * scale)]
    image = image.resize((size[0], size[1]), resampling)
    mean, std = (np.array([float(value) for value in re.findall(r"\d\.?\d*", part)]) for part in steps[4].split("divide by"))
    tall, wide = (int(side) for side in re.findall(r"\b\d+\b", steps[2]))
    border = [max(0, wide - image.width) // 2, max(0, tall - image.height) // 2]
    if "filling" in steps[2]:
        image = ImageOps.expand(image, (border[0], border[1]), tuple(round(255 * value) for value in mean))
    left, top = (image.width - wide) // 2, (image.height - tall) // 2
    pixels = np.asarray(image.crop((left, top, left + wide, top + tall)), dtype=np.float64) / 255
    return torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, "shorter side to 64 pixels (bicubic"),
        ({"interpolation": "bilinear", "crop_pct": 1.0}, "shorter side to 32 pixels (bilinear"),
        ({"input_size": (3, 32, 48)}, "just covers 64 x 96"),
        ({"crop_mode": "squash"}, "whatever the shape"),
        ({"crop_mode": "border", "crop_pct": 1.0}, "just fits into 32 x 32"),
    ],
    ids=str,
)
def test_steps_followed_by_hand(tiny_vit: nn.Module, change: dict[str, object], word: str) -> None:
    made = {"input_size": (3, 32, 32), "crop_pct": 0.5, "crop_mode": "center", "interpolation": "bicubic"}
    tiny_vit.pretrained_cfg = {**tiny_vit.pretrained_cfg, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), **made, **change}
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (256, 128, 3), dtype=np.uint8)
    )  # all sizes come out whole
    steps = preprocessing_steps(tiny_vit)  # type: ignore[arg-type]
    assert word in steps[1]
    assert relative(followed(steps, image), transform_for(tiny_vit)(image)) < 1e-6
