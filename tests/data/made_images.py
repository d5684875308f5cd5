"""Images and readers made by hand."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lpvit_cli.data.batches import Batches
from lpvit_cli.recipe.data import DataSection

HALF, IMAGENET = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INSECTS = {"wasp": 2, "ant": 3, "bee": 1}


class Eye(nn.Module):
    """A model as far as its images are concerned."""

    def __init__(self, num_classes: int, **config: Any):
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg = {"input_size": (3, 16, 16), "mean": HALF[0], "std": HALF[1], "crop_pct": 1.0, **config}


class Numbered:
    """Image i is grey of brightness i and has label i; those in `broken` cannot be read."""

    def __init__(self, length: int, broken: tuple[int, ...] = ()):
        self.length, self.broken, self.asked = length, broken, list[int]()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.asked.append(index)
        if index in self.broken:
            raise OSError("broken")
        return Image.new("L", (2, 2), index), index

    def __len__(self) -> int:
        return self.length

    def filename(self, index: int) -> str:
        return f"image {index}"


class Stream(IterableDataset):
    """Ten numbered images that can only be read one after the other, as timm's webdatasets are."""

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return ((Image.new("RGB", (2, 2), (i, i, i)), i) for i in range(10))


def brightness(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).astype(np.float32)).permute(2, 0, 1)


def random_image(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def write_split(root: Path, name: str, classes: dict[str, int], kind: str = "folder") -> Path:
    """Class folders with that many PNGs each, or the same as a tar file."""
    split = root / name
    split.mkdir(parents=True)
    for label, (class_name, count) in enumerate(classes.items()):
        (split / class_name).mkdir()
        for i in range(count):
            random_image(100 * label + i).save(split / class_name / f"{i}.png")
    if kind == "tar":
        with tarfile.open(root / f"{name}.tar", "w") as archive:
            archive.add(split, arcname=".")
        split.rename(root / "unpacked")
    return split


def files(root: Path | None, kind: str = "folder", **more: Any) -> DataSection:
    return DataSection(dataset=kind, root=root, workers=0, **more)


def labels_of(source: Batches, epoch: int = 0) -> list[int]:
    labels = []
    for images, batch in source.epoch(epoch):
        assert not len(batch) or images[:, 0, 0, 0].tolist() == batch.tolist(), "an image lost its label"
        labels += batch.tolist()
    return labels


both_kinds = pytest.mark.parametrize("kind", ["folder", "tar"])
