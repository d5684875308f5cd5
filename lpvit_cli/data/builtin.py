"""Images that need no files: scikit-learn's digits, and generated ones for smoke runs."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lpvit_cli.data.pixels import Picture
from lpvit_cli.errors import UsageError, require

GENERATED_CLASSES = 4  # for a model that tells none apart


class DigitsReader:
    """scikit-learn's 1,797 real 8x8 grey images of handwritten digits, in a fixed random split of 1,437 and 360."""

    class_to_idx = {str(digit): digit for digit in range(10)}  # noqa: RUF012

    def __init__(self, split: str):
        require("sklearn", install="scikit-learn")
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.images))
        chosen = {"train": order[:1437], "validation": order[1437:], "all": order}.get(split)
        if chosen is None:
            raise UsageError(f"data: digits has no split {split!r}", "its splits are train and validation")
        self.images = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.labels = digits.target[chosen]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])

    def __len__(self) -> int:
        return len(self.images)

    def filename(self, index: int) -> str:
        return f"digit {index}"


class SyntheticReader:
    """Smooth random images with a class of their own each; for smoke runs and timing, where pixels do not matter."""

    def __init__(self, length: int, num_classes: int, size: tuple[int, int], channels: int = 3):
        self.length, self.num_classes, self.size, self.channels = length, num_classes or GENERATED_CLASSES, size, channels

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        coarse = np.random.RandomState(index).randint(0, 256, (4, 4, self.channels), dtype=np.uint8)
        height, width = self.size
        planes = [
            np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
            for plane in coarse.transpose(2, 0, 1)
        ]
        image = np.stack(planes, axis=-1)
        return Image.fromarray(image) if self.channels == 3 else image, index % self.num_classes

    def __len__(self) -> int:
        return self.length

    def filename(self, index: int) -> str:
        return f"generated {index}"
