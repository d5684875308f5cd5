"""Data sets: splits and labels, data sets by name, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
from made_images import (
    INSECTS,
    Eye,
    Numbered,
    Stream,
    both_kinds,
    brightness,
    files,
    labels_of,
    write_split,
)

from lpvit_cli.data.batches import batches
from lpvit_cli.data.readers import (
    DigitsReader,
    SyntheticReader,
    class_names,
    is_labelled,
    open_images,
    require_same_classes,
)
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.recipe.data import DataSection


def test_digits_have_two_disjoint_splits_that_never_change() -> None:
    train, val = DigitsReader("train"), DigitsReader("validation")
    assert (len(train), len(val)) == (1437, 360)

    from sklearn.datasets import load_digits

    whole = load_digits()
    everything = np.concatenate([train.images, val.images]).reshape(1797, -1)
    expected = np.round(whole.images * 255 / 16).astype(np.uint8).reshape(1797, -1)
    assert sorted(map(bytes, everything)) == sorted(map(bytes, expected))
    labels = {bytes(image): label for image, label in zip(expected, whole.target, strict=True)}
    for reader in (train, val):
        assert [labels[reader[i][0].tobytes()] for i in range(len(reader))] == [reader[i][1] for i in range(len(reader))]
    assert np.array_equal(DigitsReader("train").images, train.images)
    assert [val[i][1] for i in range(12)] == [7, 9, 4, 7, 0, 2, 6, 1, 3, 1, 3, 7]
    assert class_names(train) == tuple("0123456789")


@pytest.mark.parametrize("split", ["test", "val", ""])
def test_digits_has_no_other_split(split: str) -> None:
    with pytest.raises(UsageError, match=f"digits has no split '{split}'") as caught:
        open_images(files(None, "digits"), split, Eye(10))
    assert caught.value.hint == "its splits are train and validation"


def test_generated_images_fit_the_model_and_repeat() -> None:
    section = files(None, "synthetic")
    model = Eye(5, input_size=(3, 16, 24))
    train, val = (open_images(section, split, model) for split in ("train", "validation"))
    assert (len(train), len(val)) == (64, 32)
    assert [train[i][1] for i in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    assert train[0][0].size == (24, 16)
    assert np.array_equal(train[3][0], SyntheticReader(4, 5, (16, 24))[3][0])
    assert not np.array_equal(train[3][0], train[4][0])


@both_kinds
def test_labels_are_positions_in_the_sorted_class_names(tmp_path: Path, kind: str) -> None:
    write_split(tmp_path, "train", INSECTS, kind)
    model, section = Eye(3), files(tmp_path, kind)
    reader: Any = open_images(section, "train", model)
    assert len(reader) == 6
    found = [(Path(reader.filename(i)).parent.name, int(reader[i][1])) for i in range(6)]
    assert sorted(found) == [("ant", 0)] * 3 + [("bee", 1)] + [("wasp", 2)] * 2
    for images, labels in batches(model, reader, section):
        assert images.shape == (6, 3, 16, 16)
        assert sorted(labels.tolist()) == [0, 0, 0, 1, 2, 2]


@both_kinds
def test_classes_have_the_names_of_their_folders(tmp_path: Path, kind: str) -> None:
    write_split(tmp_path, "train", INSECTS, kind)
    assert class_names(open_images(files(tmp_path, kind), "train", Eye(3))) == ("ant", "bee", "wasp")


@pytest.mark.parametrize(
    ("split", "place"),
    [("validation", "val"), ("validation", "valid"), ("validation", "test"), ("train", "training"), ("mine", "mine")],
)
@both_kinds
def test_splits_are_found_under_their_usual_names(tmp_path: Path, kind: str, split: str, place: str) -> None:
    write_split(tmp_path, place, {"ant": 1, "bee": 1}, kind)
    assert len(open_images(files(tmp_path, kind), split, Eye(2))) == 2  # type: ignore[arg-type]


def test_validation_is_the_first_of_its_names(tmp_path: Path) -> None:
    write_split(tmp_path, "test", {"ant": 5, "bee": 1})
    write_split(tmp_path, "val", {"ant": 1, "bee": 1})
    assert len(open_images(files(tmp_path), "validation", Eye(2))) == 2  # type: ignore[arg-type]


@both_kinds
def test_a_missing_split_is_never_replaced_by_another(tmp_path: Path, kind: str) -> None:
    write_split(tmp_path, "train", INSECTS, kind)
    ending = ".tar" if kind == "tar" else ""
    with pytest.raises(UsageError, match=rf"has no validation{ending} or val{ending} or") as caught:
        open_images(files(tmp_path, kind), "validation", Eye(3))
    assert str(tmp_path) in caught.value.message
    assert "data.root" in caught.value.hint
    with pytest.raises(UsageError, match=f"has no mine{ending}$"):
        open_images(files(tmp_path, kind), "mine", Eye(3))


def test_folders_are_no_tar_files(tmp_path: Path) -> None:
    write_split(tmp_path, "train", INSECTS)
    with pytest.raises(UsageError, match=r"has no train\.tar"):
        open_images(files(tmp_path, "tar"), "train", Eye(3))


@both_kinds
def test_root_must_be_given_and_exist(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match="data.root") as caught:
        open_images(files(None, kind), "train", Eye(3))
    assert "--set data.root=" in caught.value.hint
    with pytest.raises(UsageError, match="absent: no such folder$"):
        open_images(files(tmp_path / "absent", kind), "train", Eye(3))


@both_kinds
def test_a_split_without_images(tmp_path: Path, kind: str) -> None:
    split = write_split(tmp_path, "train", {"ant": 0, "bee": 0}, kind)
    with pytest.raises(UsageError, match=rf"{split.name}.*: holds no images"):
        open_images(files(tmp_path, kind), "train", Eye(2))


@pytest.mark.parametrize("damage", [lambda tar: tar[: len(tar) // 2 + 100], lambda tar: b"not a tar file"])
def test_a_damaged_tar_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write_split(tmp_path, "train", INSECTS, "tar")
    archive = tmp_path / "train.tar"
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(EnvironmentFault, match=r"train\.tar"):
        open_images(files(tmp_path, "tar"), "train", Eye(3))


@both_kinds
@pytest.mark.parametrize("num_classes", [0, 1, 5])
def test_images_of_one_folder_have_no_labels(tmp_path: Path, kind: str, num_classes: int) -> None:
    write_split(tmp_path, "train", {"ant": 2}, kind)
    source = open_images(files(tmp_path, kind), "train", Eye(num_classes))
    assert not is_labelled(source)
    assert class_names(source) is None
    assert source[0][1] == source[1][1] == -1


@pytest.mark.parametrize("num_classes", [2, 4, 1000])
@both_kinds
def test_as_many_classes_as_the_model_has(tmp_path: Path, kind: str, num_classes: int) -> None:
    write_split(tmp_path, "train", INSECTS, kind)
    with pytest.raises(UsageError, match=f"train split has 3 classes, the model tells {num_classes} apart") as caught:
        open_images(files(tmp_path, kind), "train", Eye(num_classes))
    assert "num_classes=3" in caught.value.hint


@both_kinds
def test_both_splits_need_the_same_classes(tmp_path: Path, kind: str) -> None:
    for name, classes in {"train": ["ant", "bee"], "val": ["ant", "cow"], "test": ["bee", "ant"]}.items():
        write_split(tmp_path / name, name, dict.fromkeys(classes, 1), kind)
    section = {name: files(tmp_path / name, kind) for name in ("train", "val", "test")}
    train, val, same = (open_images(section[name], name, Eye(2)) for name in section)
    with pytest.raises(UsageError, match="different classes.*bee, cow"):
        require_same_classes(train, val)
    require_same_classes(train, same)
    require_same_classes(train, Numbered(3))


@pytest.mark.parametrize("name", ["imagenet", "Digits", "hfds/", "wds", "tfds/mnist", ""])
def test_unknown_data_sets_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown dataset '{name}'") as caught:
        open_images(files(None, name), "train", Eye(10))
    assert all(known in caught.value.hint for known in ("digits", "synthetic", "folder", "tar", "hfds/NAME", "wds/NAME"))


@pytest.mark.parametrize(
    ("name", "package", "line"),
    [
        ("hfds/x", "datasets", "pip install datasets"),
        ("wds/x", "webdataset", "pip install webdataset"),
        ("digits", "sklearn", "pip install scikit-learn"),
    ],
)
def test_missing_packages_are_named_with_the_line_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, line: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == package else real(module))
    with pytest.raises(EnvironmentFault, match=f"the package '{package}' is not installed") as caught:
        open_images(files(None, name), "train", Eye(10))
    assert caught.value.hint == line


@pytest.mark.parametrize("name", ["hfds/owner/x", "wds/x"])
def test_data_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no route to the hub\na long trace")

    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object())
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(get_dataset_split_names=fail))
    monkeypatch.setattr(timm.data, "create_dataset", fail)
    with pytest.raises(EnvironmentFault, match=f"cannot open '{name}': no route to the hub$") as caught:
        open_images(files(None, name), "train", Eye(10))
    assert "network" in caught.value.hint


def test_shards_are_a_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def create(name: str, root: str, **options: Any) -> Stream:
        asked.update(options, name=name, root=root)
        return Stream()

    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object())
    monkeypatch.setattr(timm.data, "create_dataset", create)
    section = DataSection(dataset="wds/x", root=tmp_path, workers=0, batch_size=4)
    source = batches(Eye(10), open_images(section, "mine", Eye(10)), section, transform=brightness, limit=6)
    assert labels_of(source) == list(range(6))
    expected = {"name": "wds/x", "root": str(tmp_path), "split": "mine", "is_training": False, "batch_size": 4}
    assert asked == expected | {"input_img_mode": ""}, "pixels are converted by lpvit"
