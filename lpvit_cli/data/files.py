"""Images in files: folders of any depth, listed in one order everywhere, with what was left out; how splits are named."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image

from lpvit_cli.data.classes import natural
from lpvit_cli.errors import EnvironmentFault, UsageError

JUNK = ("__MACOSX", "@eaDir")  # folders of thumbnails and the like, beside all whose names begin with a dot
CANNOT_DECODE = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # formats that Pillow recognises only
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "test", "testing"),
}
ALL = "all"  # the name of the split of everything


@cache
def image_endings() -> frozenset[str]:
    """Of all files that are images: what Pillow opens, and numpy's arrays."""
    formats = Image.registered_extensions()  # which loads its plugins
    return frozenset(
        {".npy", *(ending for ending, name in formats.items() if name in Image.OPEN and name not in CANNOT_DECODE)}
    )


def is_image(path: str) -> bool:
    """Whether a path from the data's folder on, with slashes, names an image."""
    return not any(map(_is_junk, PurePosixPath(path).parts)) and PurePosixPath(path).suffix.lower() in image_endings()


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name in JUNK


class FileReader(ABC):
    """A reader of files: `paths` are the images, `left_out` counts the others; `labels` are -1 where there are none."""

    def __init__(self, root: Path, paths: list[str], others: list[str]):
        self.root, self.paths, self.left_out = root, paths, len(others)
        self.labels = [-1] * len(paths)
        self.labelled = False
        self.class_to_idx: dict[str, int] | None = None
        self.notes = [_left_out(others)] if others else []
        if not paths:
            raise UsageError(
                f"{root}: holds no images{_kinds(others)}", "images are .npy and what Pillow opens (.png, .jpg ...)"
            )

    @abstractmethod
    def open(self, index: int) -> BinaryIO: ...

    @abstractmethod
    def folders(self) -> list[str]:
        """Of every image, the folder that may be its class; "": it lies in none."""

    def classify(self, names: list[str], label_of: dict[str, int]) -> None:
        """Label the images by their folders; the labels are positions in `names`."""
        self.class_to_idx = {name: label for label, name in enumerate(names)}
        self.labels = [label_of[folder] for folder in self.folders()]
        self.labelled = True

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self.open(index), self.labels[index]

    def __len__(self) -> int:
        return len(self.paths)

    def filename(self, index: int) -> str:
        return self.paths[index]


class FolderReader(FileReader):
    """All images below a folder, in natural order; a class is the first folder, or the first below that of a split."""

    def __init__(self, root: Path, with_splits: bool = False):
        images: list[str] = []
        others: list[str] = []
        for path in _walk(str(root), "", frozenset()):
            (images if is_image(path) else others).append(path)
        super().__init__(root, sorted(images, key=natural), sorted(others, key=natural))
        self.with_splits = with_splits

    def open(self, index: int) -> BinaryIO:
        return (self.root / self.paths[index]).open("rb")

    def folders(self) -> list[str]:
        return [self._folder(path.split("/")[:-1]) for path in self.paths]

    def _folder(self, parents: list[str]) -> str:
        if self.with_splits and parents and any(parents[0].lower() in names for names in SPLIT_NAMES.values()):
            parents = parents[1:]
        return parents[0] if parents else ""

    def keep(self, chosen: list[int]) -> None:
        """Only these of the images."""
        self.paths, self.labels = [self.paths[i] for i in chosen], [self.labels[i] for i in chosen]


def _walk(folder: str, inside: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """The files below, as paths with slashes. Hidden folders and files are passed over, but for hidden images, which are told;
    links are followed, but for those to a folder that they lie in."""
    entries, facts = _listed(folder), os.stat(folder)
    if (identity := (facts.st_dev, facts.st_ino)) in above:
        return
    for entry in entries:
        if _is_folder(entry):
            if not _is_junk(entry.name):
                yield from _walk(entry.path, f"{inside}{entry.name}/", above | {identity})
        elif not _is_junk(entry.name) or Path(entry.name).suffix.lower() in image_endings():
            yield inside + entry.name


def _listed(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{folder}: no such folder", "set data.root to the folder of the images") from error
    except OSError as error:
        raise EnvironmentFault(f"{folder}: cannot be listed: {error.strerror}", "check its permissions") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _kinds(others: list[str]) -> str:
    """How many files there are instead, and of which endings."""
    if not others:
        return ""
    endings = Counter(PurePosixPath(path).suffix.lower() or "without an ending" for path in others)
    return f" (other files: {', '.join(f'{count} {ending}' for ending, count in endings.most_common(4))})"


def _left_out(others: list[str]) -> str:
    what = "1 file is no image and was" if len(others) == 1 else f"{len(others)} files are no images and were"
    return f"{what} left out (first: {others[0]})"


# splits


def split_folders(root: Path) -> dict[str, str]:
    """The folders in `root` that are named like splits, by the split; the first of its names counts."""
    if not root.is_dir():
        return {}
    present = {entry.name.lower(): entry.name for entry in _listed(str(root)) if _is_folder(entry)}
    firsts = {split: next((name for name in names if name in present), None) for split, names in SPLIT_NAMES.items()}
    return {split: present[name] for split, name in firsts.items() if name}


def held_out(count: int) -> tuple[list[int], list[int]]:
    """A fixed random choice of four fifths and a fifth of `count` things, each in order; at least one each."""
    order = np.random.RandomState(0).permutation(count)
    fifth = max(1, count // 5)
    return sorted(order[fifth:].tolist()), sorted(order[:fifth].tolist())
