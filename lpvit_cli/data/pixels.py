"""One image: from a file's bytes to what a model's transform takes, converted by value.

A model of 1 or 3 channels gets a Pillow image of 8 bits (L, RGB); one of another number gets a tensor [channels, H, W] in 0..1.
Values mean the same in every encoding: 16 bits are divided by 257, floats up to 1 are shares, floats up to 255 or 65,535 are on
the scale of 8 or 16 bits. Anything beside that (NaN, negative) is unreadable. Everything else is as Pillow converts it:
transparency is dropped, and what lies below it shows.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from lpvit_cli.errors import ForeignImage

# what Pillow and numpy raise for damaged files
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
NUMPY = b"\x93NUMPY"  # how an .npy file begins

Array = NDArray[Any]
Picture = Image.Image | Array  # as a reader may give it
ModelImage = Image.Image | Tensor


def read_picture(source: Picture | BinaryIO, channels: int, exif: bool = False) -> ModelImage:
    """Opened, decoded and converted: all that a damaged file can fail in, with one of UNREADABLE. `exif`: turned as its
    orientation tag says. Raises ForeignImage where it has other channels than the model."""
    if isinstance(source, Image.Image | np.ndarray):
        return as_model_image(source, channels)
    with source as file:
        start = file.read(len(NUMPY))
        file.seek(0)
        if start == NUMPY:
            return as_model_image(np.load(file, allow_pickle=False), channels)
        picture = Image.open(file)
        return as_model_image(ImageOps.exif_transpose(picture) if exif else picture, channels)


def as_model_image(picture: Picture, channels: int) -> ModelImage:
    """A Pillow image or an array [H, W], [H, W, C] or [C, H, W], for a model of that many channels."""
    if isinstance(picture, np.ndarray):
        planes = _channels_last(picture, channels)
        if channels not in MODES:
            return _tensor(planes)
        picture = Image.fromarray(_bytes(planes[..., 0] if planes.shape[2] == 1 else planes))
    if channels not in MODES:
        return _tensor(_bands(picture, channels))
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = Image.fromarray(_bytes(_values(picture)))
    return picture.convert(MODES[channels])


def _channels_last(array: Array, channels: int) -> Array:
    """[H, W, C]; where the model takes grey or colour, both will do."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise ForeignImage(f"is an array of {array.ndim} dimensions", "give arrays [H, W], [H, W, C] or [C, H, W]")
    fitting = (channels, *(set(MODES) if channels in MODES else ()))
    for count in fitting:
        if array.shape[2] == count:
            return array
        if array.shape[0] == count:
            return array.transpose(1, 2, 0)
    raise _foreign(min(array.shape[0], array.shape[2]), channels)


def _bands(image: Image.Image, channels: int) -> Array:
    """[H, W, channels]: the bands of an image, or the frames of a TIFF file as bands."""
    frames = getattr(image, "n_frames", 1)
    if image.format == "TIFF" and frames == channels and len(image.getbands()) == 1:
        planes = []
        for frame in range(frames):
            image.seek(frame)
            planes.append(_values(image))
        return np.stack(planes, axis=-1)
    if image.mode == "CMYK" and image.format != "TIFF":  # inks, not four channels of a sensor
        raise ForeignImage(
            f"is in CMYK, the colours of print; the model takes {channels} channels", "give images as .npy or TIFF"
        )
    if len(image.getbands()) != channels:
        raise _foreign(max(frames if image.format == "TIFF" else 1, len(image.getbands())), channels)
    return _values(image).reshape(image.height, image.width, channels)


def _foreign(count: int, channels: int) -> ForeignImage:
    return ForeignImage(
        f"has {count} {'channel' if count == 1 else 'channels'}, the model takes {channels}",
        f"use images of {channels} channels, or --set model.kwargs.in_chans={count} with weights to match",
    )


def _values(image: Image.Image) -> Array:
    """The pixels of a Pillow image; mode I counts as 16 bits, which it is in files of 16 bits."""
    array: Array = np.asarray(image)
    if array.dtype == np.int32:
        _require_within(array)
        return array.astype(np.uint16)
    return array


def _shares(array: Array) -> NDArray[np.float32]:
    """Every value as a share, in 0..1, of the largest one of its type or scale."""
    if array.dtype == bool:
        return array.astype(np.float32)
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:  # of either byte order
        return cast(NDArray[np.float32], array.astype(np.float32) / np.iinfo(array.dtype).max)
    if not np.issubdtype(array.dtype, np.floating):
        raise ForeignImage(f"is an array of {array.dtype}", "save it as uint8, uint16, or floats from 0 to 1")
    _require_within(array)
    largest = array.max(initial=0)
    scale = 1 if largest <= 1 else 255 if largest <= 255 else 65535
    return (array / scale).astype(np.float32)


def _require_within(array: Array) -> None:
    if not (array.min(initial=0) >= 0 and array.max(initial=0) <= 65535):  # NaN neither
        raise ValueError("values below 0, above 65535, or not a number")


def _bytes(array: Array) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    return cast(NDArray[np.uint8], np.rint(_shares(array).astype(np.float64) * 255).astype(np.uint8))


def _tensor(array: Array) -> Tensor:
    """[channels, H, W] of [H, W, channels]."""
    return torch.from_numpy(np.ascontiguousarray(_shares(array).transpose(2, 0, 1)))
