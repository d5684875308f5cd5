"""Images in: timm's datasets by prefix, the built-in `digits`, and generated ones for smoke runs.

A `reader` is anything with timm's reader protocol: `reader[i] -> (file or PIL image, label)`, `len`, `filename(i)`, and
`class_to_idx` where classes have names."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data.readers import create_reader
from torch.utils.data import IterableDataset

from lpvit_cli import distributed
from lpvit_cli.errors import EnvironmentFault, UsageError, require
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.recipe.data import DataSection

SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "eval", "test")}


ALL = "all"


def has_splits(data: DataSection) -> bool:
    return True


def is_labelled(source: object) -> bool:
    return class_names(source) is not None or isinstance(source, SyntheticReader)


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
    if names is not None and num_classes and len(names) != num_classes:
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
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), index % (self.num_classes or 4)

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
    return distributed.on_main(lambda: _walk(place))


def _walk(place: Path) -> Reader:
    """A reader with the sorted list of its images. To list a million takes minutes on a network disk: one process does it."""
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


def require_known_classes(model: VisionModel, source: object) -> None:
    """Labels are positions in the sorted class names: other names would silently mean other classes."""
    known, given = model.pretrained_cfg.get("label_names"), class_names(source)
    if known and given and list(known) != list(given):
        odd = sorted(set(known) ^ set(given))[:3]
        raise UsageError(
            f"data: the images have other classes than the model (for example {', '.join(odd)})", "use its own data set"
        )
