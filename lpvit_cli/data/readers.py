"""Images in: folders and tar files, data sets by prefix, the built-in `digits`, and generated ones for smoke runs.

A `reader` is anything with timm's reader protocol: `reader[i] -> (file, Pillow image or array, label)`, `len`, `filename(i)`.
It has `class_to_idx` where classes have names, `labelled` = False where labels mean nothing, and may have `notes` on how its
images were found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import IterableDataset

from lpvit_cli import distributed
from lpvit_cli.data.archives import TarReader
from lpvit_cli.data.builtin import DigitsReader, SyntheticReader
from lpvit_cli.data.classes import in_words, order_of, read_class_map
from lpvit_cli.data.files import ALL, SPLIT_NAMES, FileReader, FolderReader, held_out, split_folders
from lpvit_cli.data.hub import open_hub, open_shards
from lpvit_cli.errors import UsageError
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.recipe.data import DataSection


class Reader(Protocol):
    def __getitem__(self, index: int) -> tuple[Any, int]: ...
    def __len__(self) -> int: ...
    def filename(self, index: int) -> str: ...


def open_images(data: DataSection, split: str, model: VisionModel) -> Reader | IterableDataset:
    """The images of one split, or `all`. Raises UsageError when there are none, or when their classes cannot be the model's.

    A model without classes takes images of any, and every model takes images without labels (see `is_labelled`).
    """
    prefix, _, name = data.dataset.partition("/")
    if data.class_map is not None and data.dataset not in ("folder", "tar"):
        raise UsageError(f"data.class_map: has no meaning for {data.dataset!r}", "it is for data.dataset folder and tar")
    if data.dataset == "digits":
        reader: Any = DigitsReader(split)
    elif data.dataset == "synthetic":
        channels, *size = model.pretrained_cfg["input_size"]
        reader = SyntheticReader(64 if split == data.train_split else 32, model.num_classes, (size[0], size[1]), channels)
    elif data.dataset in ("folder", "tar"):
        reader = distributed.on_main(lambda: _read_files(data, split, model))
    elif prefix == "hfds" and name:
        reader = open_hub(data, split, model.num_classes)
    elif prefix == "wds" and name:
        reader = open_shards(data, split)
    else:
        raise UsageError(
            f"data.dataset: unknown dataset {data.dataset!r}", "use digits, synthetic, folder, tar, hfds/NAME or wds/NAME"
        )
    if data.labels == "none":
        reader.labelled = False
    _require_as_many_classes(reader, data, split, model.num_classes)
    return reader


def _known_classes(model: VisionModel) -> Sequence[str] | None:
    """The names of a classifier's classes, if it has any: transformers' LABEL_0, LABEL_1 ... are none."""
    names = model.pretrained_cfg.get("label_names") if model.num_classes else None
    return names if names and any(name != f"LABEL_{label}" for label, name in enumerate(names)) else None


def is_labelled(source: object) -> bool:
    """Whether the labels of a source mean anything."""
    return getattr(source, "labelled", True)


def class_names(source: object) -> tuple[str, ...] | None:
    """Class names in label order; ImageNet's synset ids are put into words. None: images have no labels, or these no names."""
    classes = getattr(source, "class_to_idx", None)
    return in_words(sorted(classes, key=classes.__getitem__)) if classes and is_labelled(source) else None


def require_same_classes(train: object, val: object) -> None:
    """Labels are positions in the names of classes: with other names they would silently mean other classes."""
    a, b = class_names(train), class_names(val)
    if a is not None and b is not None and a != b:
        raise UsageError(f"data: the splits have different classes ({_difference(a, b)})", "give both splits the same folders")


def require_known_classes(model: VisionModel, source: object) -> None:
    """As `require_same_classes`, of the images and what the model was trained on."""
    known, given = model.pretrained_cfg.get("label_names"), class_names(source)
    if known and given and list(known) != list(given):
        raise UsageError(
            f"data: the images have other classes than the model ({_difference(known, given)})", "use its own data set"
        )


def _difference(a: Sequence[str], b: Sequence[str]) -> str:
    odd = sorted(set(a) ^ set(b))[:3]
    return f"for example {', '.join(odd)}" if odd else "the same names in another order"


def _require_as_many_classes(reader: Any, data: DataSection, split: str, num_classes: int) -> None:
    names = class_names(reader)
    if names is None or not num_classes or len(names) == num_classes:
        return
    if data.class_map is not None:
        where = "the list" if isinstance(data.class_map, tuple) else data.class_map
        raise UsageError(
            f"data.class_map: {where} names {len(names)} classes, the model tells {num_classes} apart",
            "give the names of the model's classes, one for each",
        )
    raise UsageError(
        f"data: the {split} split has {len(names)} classes, the model tells {num_classes} apart",
        f"use the data set the model was trained on, or --set model.kwargs.num_classes={len(names)} with weights to match;"
        " if these are no classes: --set data.labels=none, or evaluate --labels none",
    )


# files


def _read_files(data: DataSection, split: str, model: VisionModel) -> FileReader:
    """The images of a split with their labels. To list a million takes minutes on a network disk: one process does it."""
    if data.root is None:
        raise UsageError(
            f"data.root: dataset {data.dataset!r} needs a place",
            "pass --set data.root=/path/to/images; to evaluate: --root /path/to/images",
        )
    if not data.root.is_dir():
        raise UsageError(f"{data.root}: no such folder", "check data.root")
    if data.dataset == "tar":
        reader: FileReader = TarReader(_place(data.root, split, ".tar"))
        _classify(reader, data, model)
        return reader
    splits = split_folders(data.root)
    if split != ALL and (splits or split not in SPLIT_NAMES):
        reader = FolderReader(_place(data.root, split, ""))
        _classify(reader, data, model)
        return reader
    reader = FolderReader(data.root, with_splits=bool(splits))
    _classify(reader, data, model)
    if split != ALL:
        _hold_out(reader, split)
    return reader


def _place(root: Path, split: str, ending: str) -> Path:
    """The folder or tar file of a split, by any of its names."""
    names = SPLIT_NAMES.get(split, (split,))
    present = split_folders(root).get(split) if not ending else None
    places = [root / name for name in ([present] if present else [name + ending for name in names])]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        wanted = " or ".join(name + ending for name in names)
        others = "" if ending else "; a folder without any splits, as --set data.root=FOLDER/train, is split by lpvit"
        raise UsageError(
            f"{root}: has no {wanted}",
            f"set data.root to the folder that holds the splits, or data.train_split/val_split{others}",
        )
    return place


def _classify(reader: FileReader, data: DataSection, model: VisionModel) -> None:
    """Label the images by their folders, where these are classes."""
    if data.labels == "none":
        return
    given, where = read_class_map(data.class_map) if data.class_map is not None else (None, "")
    folders = reader.folders()
    order = order_of(set(folders), given, where, _known_classes(model))
    if order is not None:
        reader.classify(*order)
        return
    beside = [path for path, folder in zip(reader.paths, folders, strict=True) if not folder]
    if model.num_classes and 0 < len(beside) < len(folders):
        lie = "1 image lies" if len(beside) == 1 else f"{len(beside)} images lie"
        reader.notes.append(f"{lie} beside the folders of classes (first: {beside[0]}): no image has a label")


def _hold_out(reader: FolderReader, split: str) -> None:
    count = len(reader)
    if count < 2:
        raise UsageError(
            f"{reader.root}: holds only one image", "give at least two, to calibrate on one and validate on another"
        )
    train, validation = held_out(count)
    reader.keep(train if split == "train" else validation)
    reader.notes.append(
        f"{reader.root.name} has no folders of splits: of its {count} images, a fixed random choice of {len(validation)}"
        f" is for validation, the other {len(train)} for training"
    )
