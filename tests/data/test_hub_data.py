"""Data sets of the Hugging Face library, by a stand-in for it; shards that break off."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_images import Eye, brightness, files, random_image
from PIL import Image

from lpvit_cli.data.batches import Batches, batches
from lpvit_cli.data.hub import Shards
from lpvit_cli.data.readers import class_names, is_labelled, open_images
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.recipe.data import Columns


class ClassLabel:
    def __init__(self, *names: str):
        self.names = list(names)


class Value: ...


def image_type(decode: bool = True) -> Any:
    return type("Image", (), {"decode": decode})()


class Rows:
    """Images as the library gives them without decoding; row i has class i in every column of classes."""

    def __init__(self, features: dict[str, Any], broken: Exception | None = None):
        self.features, self.broken, self.cast = features, broken, dict[str, Any]()

    def cast_column(self, name: str, kind: Any) -> Rows:
        self.cast[name] = kind
        return self

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.broken:
            raise self.broken
        stream = io.BytesIO()
        random_image(index).save(stream, "PNG")
        picture = {"bytes": stream.getvalue(), "path": None}
        return {name: picture if type(kind).__name__ == "Image" else index for name, kind in self.features.items()}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    fake = SimpleNamespace(Image=image_type, found=None, asked=[])

    def load(*args: Any, split: str, **options: Any) -> Any:
        fake.asked.append((*args, {"split": split, **options}))
        return fake.found.get(split) if isinstance(fake.found, dict) else fake.found

    fake.load_dataset = load
    fake.load_from_disk = lambda name: fake.found
    fake.get_dataset_split_names = lambda name, cache_dir: list(fake.found)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object())
    return fake


def opened(library: SimpleNamespace, features: dict[str, Any], num_classes: int = 2, **more: Any) -> Any:
    library.found = {"train": Rows(features)}
    return open_images(files(None, "hfds/owner/x", **more), "train", Eye(num_classes))


AB, ABC = ClassLabel("a", "b"), ClassLabel("a", "b", "c")


@pytest.mark.parametrize(
    ("features", "image", "label", "names"),
    [
        ({"image": image_type(), "label": AB}, "image", "label", ("a", "b")),
        ({"img": image_type(), "labels": AB, "id": Value()}, "img", "labels", ("a", "b")),
        ({"img": image_type(), "fine_label": ABC, "coarse_label": AB}, "img", "coarse_label", ("a", "b")),
        ({"photo": image_type(), "kind": AB}, "photo", "kind", ("a", "b")),
        ({"mask": image_type(), "image": image_type(), "label": Value()}, "image", "label", None),
        ({"image": image_type(), "text": Value()}, "image", None, None),
    ],
)
def test_columns_are_known_by_their_types(
    library: SimpleNamespace, features: dict[str, Any], image: str, label: str | None, names: tuple[str, ...] | None
) -> None:
    reader = opened(library, features)
    assert (reader.image, reader.label, class_names(reader)) == (image, label, names)
    assert is_labelled(reader) == (label is not None)
    assert reader.dataset.cast[image].decode is False
    source = batches(Eye(2), reader, files(None))
    ((images, labels),) = source
    assert labels.tolist() == ([0, 1] if label else [-1, -1])
    assert images.shape == (2, 3, 16, 16)
    assert library.asked == [("owner/x", {"split": "train", "cache_dir": None})], "no other split is fetched"


def test_columns_may_be_named(library: SimpleNamespace) -> None:
    features = {"left": image_type(), "right": image_type(), "fine": ABC, "coarse": ClassLabel(*"abcd")}
    with pytest.raises(UsageError, match="several columns of images") as caught:
        opened(library, features)
    assert "data.columns.image=NAME" in caught.value.hint
    with pytest.raises(UsageError, match="several columns of classes") as caught:
        opened(library, features, columns=Columns(image="right"))
    assert "data.columns.label=NAME" in caught.value.hint
    assert opened(library, features, 3, columns=Columns(image="right")).label == "fine"
    assert opened(library, features, 0, columns=Columns(image="right", label="coarse")).label == "coarse"
    assert opened(library, features, 2, columns=Columns(image="right"), labels="none").label is None
    with pytest.raises(UsageError, match="no column 'middle'"):
        opened(library, features, 3, columns=Columns(image="middle"))
    with pytest.raises(UsageError, match="no column of images"):
        opened(library, {"text": Value()})


def test_splits_go_by_their_usual_names_or_by_slices(library: SimpleNamespace) -> None:
    features = {"image": image_type(), "label": AB}
    library.found = {"train": Rows(features), "test": Rows(features)}
    assert open_images(files(None, "hfds/x"), "validation", Eye(2)).dataset is library.found["test"]  # type: ignore[union-attr]
    assert [options["split"] for _, options in library.asked] == ["test"], "train is not fetched"
    del library.found["test"]
    with pytest.raises(UsageError, match="no split 'validation'") as caught:
        open_images(files(None, "hfds/x"), "validation", Eye(2))
    assert "it has train" in caught.value.hint
    library.found = Rows(features)
    open_images(files(Path("cache"), "hfds/x"), "train[:50%]", Eye(2))
    assert library.asked[-1] == ("x", {"split": "train[:50%]", "cache_dir": str(Path("cache").resolve())})


def test_data_sets_saved_to_disk(library: SimpleNamespace, tmp_path: Path) -> None:
    rows = Rows({"image": image_type(), "label": AB})
    (tmp_path / "dataset_dict.json").touch()
    for library.found in ({"train": Rows({}), "test": rows}, rows):
        reader: Any = open_images(files(None, f"hfds/{tmp_path}"), "validation", Eye(2))
        assert reader.dataset is rows


def test_what_a_reader_raises_later_is_no_bug_of_lpvit(library: SimpleNamespace) -> None:
    reader = opened(library, {"image": image_type(), "label": AB})
    reader.dataset.broken = RuntimeError("the memory map is gone\nat 0x0")
    for workers in (0, 1):
        section = files(None).model_copy(update={"workers": workers})
        with pytest.raises(EnvironmentFault, match="cannot read 'hfds/owner/x' on: the memory map is gone$"):
            list(batches(Eye(2), reader, section))


class Breaking:
    """Shards of which the third image cannot be fetched."""

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        yield Image.new("I;16", (2, 2), 257), 0
        yield Image.new("L", (2, 2), 1), 1
        raise ConnectionResetError("gone")


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_that_break_off(workers: int) -> None:
    source = Batches(Shards(Breaking(), "wds/x"), brightness, batch_size=1, workers=workers)
    rows = iter(source)
    assert [(float(images.mean()), int(labels)) for images, labels in (next(rows), next(rows))] == [(1, 0), (1, 1)]
    with pytest.raises(EnvironmentFault, match="cannot read 'wds/x' on: gone"):
        next(rows)


def test_a_transform_that_fails_on_a_stream_is_a_bug() -> None:
    def fail(image: Image.Image) -> Any:
        raise ValueError("in the transform")

    with pytest.raises(ValueError, match="in the transform"):
        list(Batches(Shards(Breaking(), "wds/x"), fail, batch_size=1))
