"""Images in folders and tar files: which files they are, how they are split, which folders are classes."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_images import INSECTS, Eye, both_kinds, files, random_image, write_split

from lpvit_cli.commands.evaluate import where_images_are
from lpvit_cli.data.batches import batches
from lpvit_cli.data.readers import class_names, is_labelled, open_images
from lpvit_cli.errors import EnvironmentFault, UsageError


def put(root: Path, *paths: str) -> Path:
    """Small images; files of other endings are empty."""
    for at, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".npy"):
            np.save(root / path, np.full((4, 4, 3), at, np.uint8))
        elif path.endswith((".txt", ".heic", ".DS_Store")):
            (root / path).touch()
        else:
            random_image(at, 4, 4).save(root / path)
    return root


def opened(root: Path, split: str = "train", num_classes: int = 2, **more: Any) -> Any:
    return open_images(files(root, **more), split, Eye(num_classes))


def found(reader: Any) -> dict[str, int]:
    return {reader.filename(i): int(reader[i][1]) for i in range(len(reader))}


PHOTOS = [f"{kind}/{i}.png" for kind in ("ant", "bee") for i in range(10)]


# which files


def test_every_format_that_pillow_opens(tmp_path: Path) -> None:
    paths = [
        f"ant/{i}.{end}"
        for i, end in enumerate(
            ["png", "JPG", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "avif", "ppm", "jfif", "jp2", "tga", "npy"]
        )
    ]
    put(tmp_path, *paths, "bee/0.png")
    images = opened(tmp_path, "all")
    assert set(found(images)) == {*paths, "bee/0.png"}
    source = batches(Eye(2), images, files(tmp_path))
    assert sum(len(labels) for _, labels in source) == len(paths) + 1
    assert source.skipped == []


@both_kinds
def test_hidden_files_and_folders_of_no_class_are_left_out(tmp_path: Path, kind: str) -> None:
    split = write_split(tmp_path, "train", {"ant": 2, "bee": 1})
    put(split, ".ipynb_checkpoints/0.png", "__MACOSX/ant/0.png", "@eaDir/0.png", "ant/._0.png", ".cache/deep/0.png")
    put(split, "ant/notes.txt", "ant/photo.heic", "ant/.DS_Store")
    (split / "bee" / "film.mpg").touch()
    if kind == "tar":
        with tarfile.open(tmp_path / "train.tar", "w") as archive:
            archive.add(split, arcname=".")
        shutil.rmtree(split)
    reader = opened(tmp_path, kind=kind)
    assert found(reader) == {"ant/0.png": 0, "ant/1.png": 0, "bee/0.png": 1}
    assert class_names(reader) == ("ant", "bee")
    if kind == "folder":
        assert reader.left_out == 4
        assert reader.notes == ["4 files are no images and were left out (first: ant/._0.png)"]


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "0.png", "1.png")
    put(tmp_path / "root", "ant/0.png", "bee/x.png")
    (tmp_path / "root" / "bee" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "bee" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "bee" / "self").symlink_to("self")
    (tmp_path / "root" / "ant" / "gone.png").symlink_to("nowhere.png")
    reader = opened(tmp_path / "root", "all")
    assert reader.paths == ["ant/0.png", "ant/gone.png", "bee/more/0.png", "bee/more/1.png", "bee/x.png"]
    section = files(tmp_path / "root", max_corrupt=0.5)
    source = batches(Eye(2), reader, section)
    assert sum(len(labels) for _, labels in source) == 4
    assert source.notes()[-1] == "1 unreadable image skipped (first: ant/gone.png)"


def test_a_folder_that_may_not_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "ant/0.png", "bee/0.png")
    scandir = os.scandir

    def refuse(folder: str) -> Any:
        if str(folder).endswith("bee"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(EnvironmentFault, match="bee: cannot be listed: Permission denied"):
        opened(tmp_path, "all")


def test_no_images_at_all_are_an_error_that_tells_what_there_is(tmp_path: Path) -> None:
    put(tmp_path, "a/0.heic", "a/1.HEIC.heic", "notes.txt", "b/.hidden/0.png")
    (tmp_path / "README").touch()
    with pytest.raises(UsageError) as caught:
        opened(tmp_path, "all")
    assert caught.value.message == f"{tmp_path}: holds no images (other files: 2 .heic, 1 .txt, 1 without an ending)"
    with pytest.raises(UsageError, match="absent: no such folder"):
        opened(tmp_path / "absent", "all")


# splits


def test_a_folder_without_splits_is_split_by_a_fixed_random_choice(tmp_path: Path) -> None:
    put(tmp_path, *reversed(PHOTOS))
    train, validation = opened(tmp_path), opened(tmp_path, "validation")
    assert (len(train), len(validation)) == (16, 4)
    assert sorted([*found(train), *found(validation)]) == PHOTOS
    chosen = np.random.RandomState(0).permutation(20)[:4]  # of the sorted paths
    assert list(found(validation)) == [PHOTOS[at] for at in sorted(chosen)]
    assert found(train) | found(validation) == {path: int(path[0] == "b") for path in PHOTOS}
    assert class_names(train) == class_names(validation) == ("ant", "bee")
    assert "a fixed random choice of 4 is for validation, the other 16 for training" in train.notes[0]
    assert list(found(opened(tmp_path, "all"))) == PHOTOS


@pytest.mark.parametrize(("count", "validation"), [(2, 1), (4, 1), (5, 1), (10, 2), (11, 2)])
def test_validation_gets_a_fifth_and_at_least_one_image(tmp_path: Path, count: int, validation: int) -> None:
    put(tmp_path, *(f"{i}.png" for i in range(count)))
    sizes = [len(opened(tmp_path, split)) for split in ("train", "validation")]
    assert sizes == [count - validation, validation]


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    put(tmp_path, "0.png")
    assert len(opened(tmp_path, "all")) == 1
    with pytest.raises(UsageError, match="holds only one image"):
        opened(tmp_path, "validation")


def test_a_folder_with_one_split_is_not_split_again(tmp_path: Path) -> None:
    write_split(tmp_path, "train", INSECTS)
    with pytest.raises(UsageError, match="has no validation or val or") as caught:
        opened(tmp_path, "validation", 3)
    assert "FOLDER/train" in caught.value.hint
    assert len(opened(tmp_path / "train", "validation", 3)) == 1


@pytest.mark.parametrize(("train", "validation"), [("Train", "Val"), ("TRAINING", "Testing"), ("train", "valid")])
def test_case_makes_no_other_split(tmp_path: Path, train: str, validation: str) -> None:
    put(tmp_path, f"{train}/ant/0.png", f"{train}/bee/0.png", f"{validation}/ant/deep/er/1.png", f"{validation}/bee/2.png")
    assert found(opened(tmp_path)) == {"ant/0.png": 0, "bee/0.png": 1}
    assert found(opened(tmp_path, "validation")) == {"ant/deep/er/1.png": 0, "bee/2.png": 1}
    whole = opened(tmp_path, "all")
    assert sorted(found(whole).values()) == [0, 0, 1, 1]
    assert class_names(whole) == ("ant", "bee")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("folder", "/data", "mine")),
        ({"root": "plain"}, ("folder", "plain", "all")),
        ({"root": "plain", "split": "train"}, ("folder", "plain", "train")),
        ({"root": "split"}, ("folder", "split", "mine")),
        ({"dataset": "digits"}, ("digits", None, "mine")),
    ],
)
def test_evaluate_takes_a_folder_without_splits_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "plain/0.png", "split/val/0.png")
    asked = {"dataset": None, "split": None, "root": None} | given
    asked["root"] = Path(asked["root"]) if asked["root"] else None
    place = where_images_are({"dataset": "folder", "root": "/data", "split": "mine"}, **asked)
    assert (place["dataset"], place["root"] and str(place["root"]), place["val_split"]) == expected


def test_evaluate_splits_the_folder_that_the_model_remembers(tmp_path: Path) -> None:
    """Or its training images would be evaluated too."""
    put(tmp_path, *PHOTOS)
    remembered = {"dataset": "folder", "root": str(tmp_path), "split": "validation"}
    assert where_images_are(remembered, None, tmp_path, None)["val_split"] == "validation"
    assert where_images_are({}, None, tmp_path, None) == {"dataset": "folder", "root": tmp_path, "val_split": "all"}


# classes


@pytest.mark.parametrize(
    ("paths", "note"),
    [
        (["0.png", "1.png"], None),
        (["2023/0.png", "2023/01/1.png"], None),
        (
            ["ant/0.png", "bee/0.png", "sheet.png"],
            "1 image lies beside the folders of classes (first: sheet.png): no image has a label",
        ),
    ],
    ids=["flat", "one folder", "beside folders"],
)
def test_images_that_have_no_labels(tmp_path: Path, paths: list[str], note: str | None) -> None:
    reader = opened(put(tmp_path, *paths), "all")
    assert not is_labelled(reader)
    assert class_names(reader) is None
    assert set(found(reader).values()) == {-1}
    assert reader.notes == ([note] if note else [])
    assert opened(tmp_path, "all", num_classes=0).notes == [], "a model without classes misses none"


def test_images_at_the_top_of_a_tar_file_have_no_labels(tmp_path: Path) -> None:
    put(tmp_path / "train", "0.png", "ant/1.png", "bee/2.png")
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(tmp_path / "train", arcname=".")
    reader = opened(tmp_path, kind="tar")
    assert not is_labelled(reader)
    assert found(reader) == {"0.png": -1, "ant/1.png": -1, "bee/2.png": -1}


@both_kinds
def test_folders_are_no_classes_where_labels_are_none(tmp_path: Path, kind: str) -> None:
    write_split(tmp_path, "train", INSECTS, kind)
    reader = opened(tmp_path, kind=kind, labels="none")
    source = batches(Eye(2), reader, files(tmp_path))
    assert not source.labelled
    assert [label for _, labels in source for label in labels.tolist()] == [-1] * 6


def test_labels_none_holds_for_every_data_set() -> None:
    source = batches(Eye(10), opened(None, kind="digits", num_classes=10, labels="none"), files(None))  # type: ignore[arg-type]
    assert not source.labelled
    assert class_names(source.source) is None
    assert set(next(iter(source))[1].tolist()) == {-1}


@both_kinds
def test_a_model_without_classes_takes_images_of_any(tmp_path: Path, kind: str) -> None:
    write_split(tmp_path, "train", INSECTS, kind)
    reader = opened(tmp_path, num_classes=0, kind=kind)
    source = batches(Eye(0), reader, files(tmp_path))
    assert source.labelled
    assert sorted(label for _, labels in source for label in labels.tolist()) == [0, 0, 0, 1, 2, 2]
    assert sorted({opened(None, kind="synthetic", num_classes=0)[i][1] for i in range(9)}) == [0, 1, 2, 3]  # type: ignore[arg-type]


def test_a_choice_of_sorted_classes_holds_several_of_them(tmp_path: Path) -> None:
    put(tmp_path, *PHOTOS)
    source = batches(Eye(2), opened(tmp_path, "all"), files(tmp_path), limit=8)
    labels = [label for _, batch in source for label in batch.tolist()]
    assert (labels, source.available, source.images) == (sorted(labels), 20, 8)
    assert 0 < sum(labels) < 8
    assert source.notes() == ["8 of 20 images, a fixed random choice"]
    assert source.notes(["a.png", "b.png"])[1] == "2 unreadable images skipped (first: a.png)"
