"""How a Hugging Face image processor prepares an image, in timm's words."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor, nextafter
from typing import Any

from lpvit_cli.models.families.checkpoint import explained, has_file, quiet, repository_of, revision_of
from lpvit_cli.recipe.model import TRANSFORMERS

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
FILES = ("preprocessor_config.json", "processor_config.json")
DEFAULT = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", "mean": (0.5,) * 3, "std": (0.5,) * 3}


def preprocessing_of(source: str | None, config: Mapping[str, Any], resized: bool) -> dict[str, Any]:
    """timm's keys for the preprocessor_config.json of a folder or a repository of the hub (OWNER/NAME@REVISION).

    Without that file: images are resized to the config's `image_size` by ViT's own processor (bilinear, mean and std 0.5).
    `resized`: images have the config's size, whatever the file says; the share that is cropped stays.
    Raises EnvironmentFault where nobody can tell whether there is such a file, UsageError where it is of no known kind.
    """
    size = config.get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    default = {**DEFAULT, "input_size": (config.get("num_channels", 3), height, width)}
    processor = _processor(source) if source else None
    if processor is None:
        return default
    found = {**default, **_translated(processor)}
    return found | {"input_size": default["input_size"]} if resized else found


def _processor(source: str) -> Any:
    """None where there is none."""
    from transformers import AutoImageProcessor

    if not any(has_file(source, name) for name in FILES):
        return None
    with explained(TRANSFORMERS + source), quiet():
        return AutoImageProcessor.from_pretrained(repository_of(source), trust_remote_code=False, **revision_of(source))


def _translated(processor: Any) -> dict[str, Any]:
    """HF: resize, crop, x * rescale_factor, (x - mean) / std. timm: resize, crop, x / 255, (x - mean) / std."""

    def of(name: str, default: Any = None) -> Any:
        value = getattr(processor, name, None)
        return default if value is None else value

    size, crop = dict(of("size", {})), dict(of("crop_size", {}))
    crops = bool(of("do_center_crop", False)) and bool(crop.get("height"))
    found: dict[str, Any] = {"interpolation": RESAMPLE.get(int(of("resample", 2)), "bilinear")}
    resized: Any = (size["height"], size["width"]) if size.get("height") else (size.get("shortest_edge"),) * 2
    if resized[0]:
        kept = (crop["height"], crop["width"]) if crops else resized
        found["input_size"] = (3, *kept)
        found["crop_pct"] = _share(kept[0], resized[0])
        found["crop_mode"] = "squash" if size.get("height") else "center"
    scale = 255 * (of("rescale_factor", 1 / 255) if of("do_rescale", True) else 1.0)
    normalises = of("do_normalize", True)
    mean, std = (
        of(key, (default,) * 3) if normalises else (default,) * 3 for key, default in (("image_mean", 0.0), ("image_std", 1.0))
    )
    return found | {"mean": tuple(m / scale for m in mean), "std": tuple(s / scale for s in std)}


def _share(kept: int, resized: int) -> float:
    """The crop_pct that timm turns back into `resized`: it rounds kept / crop_pct down."""
    share = kept / resized
    while share < 1 and floor(kept / share) < resized:
        share = nextafter(share, 0)
    return share
