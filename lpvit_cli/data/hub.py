"""Data sets of the Hugging Face library (`hfds/NAME`) and webdataset shards (`wds/NAME`)."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from lpvit_cli.data.files import SPLIT_NAMES
from lpvit_cli.errors import EnvironmentFault, LpvitError, UsageError, require
from lpvit_cli.recipe.data import DataSection

IMAGES, LABELS = ("image", "img"), ("label", "labels")  # the usual names, where several columns would do
SAVED = ("dataset_dict.json", "state.json")  # of save_to_disk


class HubReader:
    """A data set of the Hugging Face library: its column of images, not decoded, and that of labels, if it has one."""

    def __init__(self, dataset: Any, data: DataSection, num_classes: int):
        self.name, columns = data.dataset, data.columns
        self.image = columns.image or _image_column(dataset.features)
        self.label = None
        if data.labels == "auto":
            self.label = columns.label or _label_column(dataset.features, num_classes)
        for column in filter(None, (self.image, self.label)):
            if column not in dataset.features:
                raise UsageError(
                    f"data.columns: {self.name} has no column {column!r}", f"its columns are {_listed(dataset.features)}"
                )
        names = getattr(dataset.features[self.label], "names", ()) if self.label else ()
        self.class_to_idx = {name: label for label, name in enumerate(names)} or None
        self.labelled = self.label is not None and len(names) != 1
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        row = self._row(index)
        image, label = row[self.image], row[self.label] if self.label else None
        if not isinstance(image, Mapping) or not (image.get("bytes") or image.get("path")):
            raise ValueError("no image in this row")
        label = -1 if label is None else int(label)
        return io.BytesIO(image["bytes"] if image.get("bytes") else Path(image["path"]).read_bytes()), label

    def _row(self, index: int) -> dict[str, Any]:
        try:
            row: dict[str, Any] = self.dataset[index]
        except Exception as error:  # of files, memory maps, networks; each means: this row is not to be had
            raise unreadable(self.name, error) from error
        return row

    def __len__(self) -> int:
        return len(self.dataset)

    def filename(self, index: int) -> str:
        return f"row {index}"


class Shards(IterableDataset):
    """timm's webdataset of images, not transformed. What its shards raise is an EnvironmentFault."""

    def __init__(self, dataset: Any, name: str):
        self.dataset, self.name = dataset, name
        self.class_to_idx = getattr(getattr(dataset, "reader", None), "class_to_idx", None)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        rows = iter(self.dataset)
        while True:
            try:
                image, label = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise unreadable(self.name, error) from error
            yield image, int(label)

    def __len__(self) -> int:
        return len(self.dataset)


def open_hub(data: DataSection, split: str, num_classes: int) -> HubReader:
    require("datasets")
    import datasets

    name = data.dataset.removeprefix("hfds/")
    try:
        found = _load(datasets, name, split, str(data.root) if data.root else None)
    except LpvitError:
        raise
    except Exception as error:  # hub clients raise many kinds; each means: this data is not to be had
        raise not_to_be_had(data.dataset, error) from error
    reader = HubReader(found, data, num_classes)
    try:
        reader.dataset = found.cast_column(reader.image, datasets.Image(decode=False))
    except Exception as error:
        raise not_to_be_had(data.dataset, error) from error
    return reader


def open_shards(data: DataSection, split: str) -> Shards:
    require("webdataset")
    from timm.data import create_dataset

    root = str(data.root) if data.root else None
    try:
        options: dict[str, Any] = {"split": split, "is_training": False, "batch_size": data.batch_size}
        options["input_img_mode"] = ""  # not converted
        return Shards(create_dataset(data.dataset, root, **options), data.dataset)
    except Exception as error:
        raise not_to_be_had(data.dataset, error) from error


def _load(datasets: Any, name: str, split: str, cache: str | None) -> Any:
    """One split of a data set from the hub, a local folder, or a folder of save_to_disk."""
    saved = any((Path(name) / file).is_file() for file in SAVED)
    if saved:
        found = datasets.load_from_disk(name)
        return found[_place(name, split, found)] if isinstance(found, Mapping) else found
    if split in SPLIT_NAMES:
        split = _place(name, split, datasets.get_dataset_split_names(name, cache_dir=cache))
    return datasets.load_dataset(name, split=split, cache_dir=cache)  # which may be a slice: train[:80%]


def _place(name: str, split: str, present: Collection[str]) -> str:
    """The split by any of its names."""
    place = next((one for one in SPLIT_NAMES.get(split, (split,)) if one in present), None)
    if place is None:
        raise UsageError(
            f"data: hfds/{name} has no split {split!r}", f"set data.train_split and val_split: it has {_listed(present)}"
        )
    return place


def _image_column(features: Mapping[str, Any]) -> str:
    images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    usual = [name for name in IMAGES if name in images]
    if len(images) == 1 or usual:
        return (usual or images)[0]
    what = f"several columns of images ({', '.join(images)})" if images else "no column of images"
    raise UsageError(f"data: the data set has {what}", f"--set data.columns.image=NAME; its columns are {_listed(features)}")


def _label_column(features: Mapping[str, Any], num_classes: int) -> str | None:
    """The column of as many classes as the model has; else of the usual name; else the only one, or of a model without classes
    the first."""
    classes = {name: len(kind.names) for name, kind in features.items() if type(kind).__name__ == "ClassLabel"}
    fitting = [name for name, count in classes.items() if count == num_classes]
    usual = [name for name in LABELS if name in (classes or features)]
    if len(fitting) == 1 or usual or len(classes) < 2 or not num_classes:
        return next(iter([*(fitting if len(fitting) == 1 else []), *usual, *classes]), None)
    raise UsageError(
        f"data: the data set has several columns of classes ({', '.join(classes)})", "--set data.columns.label=NAME"
    )


def _listed(names: Any) -> str:
    return ", ".join(names)


def not_to_be_had(name: str, error: Exception) -> EnvironmentFault:
    return EnvironmentFault(
        f"data.dataset: cannot open {name!r}: {_reason(error)}", "check the name, data.root and the network"
    )


def unreadable(name: str, error: Exception) -> EnvironmentFault:
    return EnvironmentFault(f"data.dataset: cannot read {name!r} on: {_reason(error)}", "check its files and the network")


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
