"""Images in: timm's datasets by prefix, the built-in `digits`, and generated ones for smoke runs.

A `reader` is anything with timm's reader protocol: `reader[i] -> (file or PIL image, label)`, `len`, `filename(i)`, and
`class_to_idx` where classes have names. `open_images` makes one; `Batches` feeds a model from it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.data.readers import create_reader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lpvit_cli import distributed
from lpvit_cli.errors import EnvironmentFault, ForeignLabel, UsageError, require
from lpvit_cli.models import VisionModel
from lpvit_cli.randomness import seeded
from lpvit_cli.recipe import Augment, DataSection

SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "eval", "test")}
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for damaged images
Batch = tuple[Tensor, Tensor]  # images [n, 3, H, W] float32, labels [n] int64


class Reader(Protocol):
    def __getitem__(self, index: int) -> tuple[Any, int]: ...
    def __len__(self) -> int: ...
    def filename(self, index: int) -> str: ...


def open_images(data: DataSection, split: str, model: VisionModel) -> Reader | IterableDataset:
    """The images of one split. Raises UsageError when there are none, or when their classes cannot be the model's."""
    num_classes = model.num_classes
    prefix, _, name = data.dataset.partition("/")
    if data.dataset == "digits":
        reader: Any = DigitsReader(split)
    elif data.dataset == "synthetic":
        reader = SyntheticReader(64 if split == data.train_split else 32, num_classes, model.pretrained_cfg["input_size"][1:])
    elif data.dataset in ("folder", "tar"):
        reader = _read_files(data, split)
    elif prefix in ("hfds", "wds") and name:
        require({"hfds": "datasets", "wds": "webdataset"}[prefix])
        reader = _read_remote(data, split)
    else:
        raise UsageError(
            f"data.dataset: unknown dataset {data.dataset!r}", "use digits, synthetic, folder, tar, hfds/NAME or wds/NAME"
        )
    names = class_names(reader)
    if names is not None and len(names) < 2:
        raise UsageError(
            f"data: the {split} split has only one class ({names[0]})", "one folder per class is needed below the split"
        )
    if names is not None and len(names) != num_classes:
        raise UsageError(
            f"data: the {split} split has {len(names)} classes, the model tells {num_classes} apart",
            f"use the data set the model was trained on, or --set model.kwargs.num_classes={len(names)} with weights to match",
        )
    return reader


def class_names(reader: object) -> tuple[str, ...] | None:
    """Class names in label order; ImageNet's synset ids are put into words."""
    names = ("class_to_idx", "class_name_to_idx")  # timm's readers of folders and of tar files; datasets hold a reader
    places = [getattr(place, name, None) for place in (reader, getattr(reader, "reader", None)) for name in names]
    classes = next(filter(None, places), None)
    if classes is None:
        return None
    ordered = sorted(classes, key=classes.__getitem__)
    if len(ordered) == 1000 and all(n.startswith("n") and n[1:].isdigit() for n in ordered):
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return tuple(info.label_name_to_description(name) for name in ordered)
    return tuple(str(name) for name in ordered)


def require_same_classes(train: object, val: object) -> None:
    """Labels are positions in the sorted class names: with other names they would silently mean other classes."""
    a, b = class_names(train), class_names(val)
    if a is not None and b is not None and a != b:
        odd = sorted(set(a) ^ set(b))[:3]
        raise UsageError(
            f"data: the splits have different classes (for example {', '.join(odd)})", "give both splits the same folders"
        )


class DigitsReader:
    """scikit-learn's 1,797 real 8x8 grey images of handwritten digits, in a fixed random split of 1,437 and 360."""

    class_to_idx = {str(digit): digit for digit in range(10)}  # noqa: RUF012

    def __init__(self, split: str):
        require("sklearn", install="scikit-learn")
        from sklearn.datasets import load_digits

        if split not in SPLIT_NAMES:
            raise UsageError(f"data: digits has no split {split!r}", "its splits are train and validation")
        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.images))
        chosen = order[:1437] if split == "train" else order[1437:]
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

    def __init__(self, length: int, num_classes: int, size: tuple[int, int]):
        self.length, self.num_classes, self.size = length, num_classes, size

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        coarse = np.random.RandomState(index).randint(0, 256, (4, 4, 3), dtype=np.uint8)
        height, width = self.size
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), index % self.num_classes

    def __len__(self) -> int:
        return self.length

    def filename(self, index: int) -> str:
        return f"generated {index}"


def _read_files(data: DataSection, split: str) -> Reader:
    """Class folders below ROOT/split, or the tar files ROOT/split.tar."""
    if data.root is None:
        raise UsageError(f"data.root: dataset {data.dataset!r} needs a place", "pass --set data.root=/path/to/images")
    ending = ".tar" if data.dataset == "tar" else ""
    names = SPLIT_NAMES.get(split, (split,))
    place = next((data.root / (name + ending) for name in names if (data.root / (name + ending)).exists()), None)
    if place is None:
        wanted = " or ".join(name + ending for name in names)
        what = "has no" if data.root.is_dir() else "does not exist, so has no"
        raise UsageError(
            f"{data.root}: {what} {wanted}", "set data.root to the folder that holds the splits, or data.train_split/val_split"
        )
    try:
        reader: Reader = create_reader("", str(place))
    except tarfile.TarError as error:
        raise EnvironmentFault(f"{place}: not a readable tar file: {error}", "copy or download it again") from error
    except (RuntimeError, ValueError) as error:  # timm unpacks an empty list where a tar file holds no images
        raise UsageError(f"{place}: holds no images", "put images into one folder per class below it") from error
    return reader


def _read_remote(data: DataSection, split: str) -> Any:
    """Hugging Face datasets (a reader) and webdataset shards (an iterable), as timm loads them."""
    from timm.data import create_dataset

    root = str(data.root) if data.root else None
    try:
        if data.dataset.startswith("hfds/"):
            return create_reader(data.dataset, root, split=split)
        return create_dataset(data.dataset, root, split=split, is_training=False, batch_size=data.batch_size)
    except Exception as error:  # hub clients and shard readers raise many kinds; each means: this data is not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentFault(
            f"data.dataset: cannot open {data.dataset!r}: {reason}", "check the name, data.root and the network"
        ) from error


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


class _Guarded(Dataset):
    """Transformed images; an unreadable one becomes its file name instead of an exception in a worker.

    With a `seed`, what the transform draws depends on it and the image only.
    """

    def __init__(self, reader: Reader, transform: Any, seed: tuple[int, ...] | None):
        self.reader, self.transform, self.seed = reader, transform, seed

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        try:
            image, label = self.reader[index]
            if not isinstance(image, Image.Image):
                with image:
                    image = Image.open(image).convert("RGB")
            image = image.convert("RGB")
            if self.seed is None:
                return self.transform(image), label
            with seeded(*self.seed, index):
                return self.transform(image), label
        except UNREADABLE:
            return self.reader.filename(index)


def _collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    good = [item for item in items if not isinstance(item, str)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return images, labels, [item for item in items if isinstance(item, str)]


@dataclass
class Batches:
    """Iterable over (images, labels). Unreadable images are skipped and listed in `skipped`; too many are an error.

    `limit` takes that many images: a random choice fixed by `seed` when shuffling, else the first ones. With several processes
    each gets its share of every batch. `augmented`: the transform draws random numbers.
    """

    source: Reader | IterableDataset
    transform: Any
    batch_size: int  # of all processes together
    num_classes: int | None = None  # labels must be below; None: any
    workers: int = 0
    shuffle: bool = False
    augmented: bool = False
    seed: int = 0
    limit: int | None = None
    max_corrupt: float = 0.01
    skipped: list[str] = field(default_factory=list)

    @property
    def images(self) -> int | None:
        """How many images one pass of all processes asks for; None where the source does not know."""
        try:
            available = len(self.source)  # type: ignore[arg-type]
        except TypeError:
            return self.limit
        return min(available, self.limit or available)

    @property
    def share(self) -> int:
        """About how many images one pass of this process asks for; 0 where the source does not know."""
        return -(-(self.images or 0) // distributed.world())

    def __len__(self) -> int:
        return -(-(self.images or 0) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch in self.epoch(0) if len(batch[0]))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """One pass, from batch `start` on; its order and images depend on seed and number only.

        Every process gets as many batches as the others. One is empty where a process has no readable image in it.
        """
        if isinstance(self.source, IterableDataset):
            yield from self._stream()
            return
        generator = np.random.RandomState((self.seed * 100_003 + number) % 2**32)
        indices = np.arange(len(self.source))
        if self.limit and self.shuffle:
            indices = np.random.RandomState(self.seed).permutation(indices)
        indices = indices[: self.limit]
        if self.shuffle:
            indices = generator.permutation(indices)
        rank, world = distributed.rank(), distributed.world()
        whole = [indices[at : at + self.batch_size] for at in range(0, len(indices), self.batch_size)][start:]
        dataset = _Guarded(self.source, self.transform, (self.seed, number) if self.augmented else None)
        shares = [batch[rank::world].tolist() for batch in whole]
        loader = DataLoader(dataset, batch_sampler=shares, num_workers=self.workers, collate_fn=_collate)
        empty = start == 0 and (any(shares) or not shares)  # a share may be empty where others' are not
        for images, labels, unreadable in loader:
            self._count(unreadable, -(-len(indices) // world))
            self._require_known(labels)
            empty = empty and not len(images)
            yield images, labels
        if empty:
            raise EnvironmentFault("data: not one image could be read", "check data.root and the split")

    def _count(self, unreadable: list[str], total: int) -> None:
        self.skipped += [name for name in unreadable if name not in self.skipped]
        if unreadable and len(self.skipped) > self.max_corrupt * total:
            raise EnvironmentFault(
                f"data: {len(self.skipped)} of {total} images cannot be read so far, more than data.max_corrupt"
                f" (first: {self.skipped[0]})",
                "repair or remove them, or raise data.max_corrupt",
            )

    def _require_known(self, labels: Tensor) -> None:
        strange = [label for label in labels.tolist() if self.num_classes is not None and not 0 <= label < self.num_classes]
        if strange and self.num_classes:
            raise ForeignLabel(
                f"data: an image has label {strange[0]}, but the model has classes 0 to {self.num_classes - 1}",
                "use the data set the model was trained on, or a model with a head for these classes",
            )

    def _stream(self) -> Iterator[Batch]:
        self.source.transform = self.transform  # type: ignore[union-attr]
        rank, world = distributed.rank(), distributed.world()
        seen = 0
        for images, labels in DataLoader(self.source, self.batch_size, num_workers=min(self.workers, 1)):  # type: ignore[arg-type]
            images = images[: self.limit - seen] if self.limit else images
            labels = labels[: len(images)]
            self._require_known(labels)
            seen += len(images)
            yield images[rank::world], labels[rank::world]
            if self.limit and seen >= self.limit:
                return


def batches(model: VisionModel, source: Reader | IterableDataset, data: DataSection, **options: Any) -> Batches:
    """Batches of `source` as `model` wants them, with the recipe's batch size, workers and patience."""
    options.setdefault("transform", transform_for(model))
    options.setdefault("batch_size", data.batch_size)
    return Batches(source, num_classes=model.num_classes, workers=data.workers, max_corrupt=data.max_corrupt, **options)


def read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such image", "check the path") from error
    except UNREADABLE as error:
        raise EnvironmentFault(f"{path}: not a readable image", "give a PNG, JPEG or another format Pillow reads") from error
