"""The order of classes: natural, the same everywhere, or as a map or the model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_images import Eye, both_kinds, files, write_split
from timm.utils.misc import natural_key

from lpvit_cli.data.classes import natural, order_of, read_class_map
from lpvit_cli.data.readers import class_names, open_images, require_known_classes
from lpvit_cli.errors import UsageError
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.data import DataSection


@both_kinds
def test_natural_order_does_not_depend_on_the_hashes_of_names(tmp_path: Path, kind: str) -> None:
    """timm breaks ties in the order of a set: another one in every process."""
    names = ["B", "1", "a", "10", "A", "01", "b", "2", "001"]
    write_split(tmp_path, "train", dict.fromkeys(names, 1), kind)
    reader: Any = open_images(files(tmp_path, kind), "train", Eye(9))
    expected = ["001", "01", "1", "2", "10", "A", "a", "B", "b"]
    assert class_names(reader) == tuple(expected)
    assert [reader.filename(i).split("/")[0] for i in range(9)] == [expected[int(reader[i][1])] for i in range(9)]


def test_natural_order_is_timms_but_for_ties() -> None:
    names = ["n02", "n1", "x10y2", "x9y3", "Zebra", "apple", "10", "9", "x10y10", "émeu"]
    assert sorted(names, key=natural) == sorted(names, key=natural_key)


MAPS = {
    "map.json": '{"bee": 1, "ant": 2, "cow": 0}',
    "list.json": '["cow", "bee", "ant"]',
    "names.txt": "\ufeffcow\nbee\n\nant\n",
    "spaces.txt": "ant 2\nbee 1\ncow 0\n",
    "commas.txt": "ant, 2\nbee,1\ncow ,0",
}


@pytest.mark.parametrize("name", MAPS)
def test_a_file_gives_the_order_of_labels(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(MAPS[name], encoding="utf-8")
    assert read_class_map(tmp_path / name) == (["cow", "bee", "ant"], str(tmp_path / name))


def test_names_may_end_in_numbers(tmp_path: Path) -> None:
    (tmp_path / "planes.txt").write_text("boeing 737\nboeing 747\nairbus a320\n")
    assert read_class_map(tmp_path / "planes.txt")[0] == ["boeing 737", "boeing 747", "airbus a320"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"ant": 0, "bee": 2}', "indices 0, 1, 2"),
        ("a.json", '{"0": ["n01", "ant"]}', "indices 0, 1, 2"),
        ("a.json", "[1, 2]", "indices 0, 1, 2"),
        ("a.json", "{", "Expecting property name"),
        ("a.txt", "ant\nbee\nant", "'ant' twice"),
        ("a.txt", None, "cannot be read"),
    ],
)
def test_files_that_are_no_order(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=f"data.class_map: .*{name}.*{message}"):
        read_class_map(tmp_path / name)


@both_kinds
def test_labels_follow_the_map_also_of_classes_without_images(tmp_path: Path, kind: str) -> None:
    write_split(tmp_path, "train", {"ant": 1, "bee": 1}, kind)
    reader: Any = open_images(files(tmp_path, kind, class_map=("cow", "bee", "ant")), "train", Eye(3))
    assert class_names(reader) == ("cow", "bee", "ant")
    assert {reader.filename(i).split("/")[0]: int(reader[i][1]) for i in range(2)} == {"ant": 2, "bee": 1}


def test_a_map_that_does_not_fit(tmp_path: Path) -> None:
    write_split(tmp_path, "train", {"ant": 1, "bee": 1})
    path = tmp_path / "classes.txt"
    path.write_text("ant\ncow\n")
    with pytest.raises(UsageError, match=f"{path} has no class 'bee'"):
        open_images(files(tmp_path, class_map=path), "train", Eye(2))
    path.write_text("ant\ncow\nbee")
    with pytest.raises(UsageError, match=f"{path} names 3 classes, the model tells 2 apart"):
        open_images(files(tmp_path, class_map=path), "train", Eye(2))
    with pytest.raises(UsageError, match="no meaning for 'digits'"):
        open_images(files(None, "digits", class_map=path), "train", Eye(10))


def test_images_follow_the_order_that_the_model_knows(tmp_path: Path) -> None:
    """Also where only some of its classes have images."""
    write_split(tmp_path, "train", {"ant": 1, "bee": 1})
    write_split(tmp_path, "val", {"bee": 1})
    model = Eye(3, label_names=["cow", "bee", "ant"])
    for split, labels in (("train", [2, 1]), ("validation", [1])):
        reader: Any = open_images(files(tmp_path), split, model)
        assert [reader[i][1] for i in range(len(reader))] == labels
        require_known_classes(model, reader)
    stranger = Eye(2, label_names=["ant", "fly"])
    with pytest.raises(UsageError, match="the folder 'bee' .* knows 'fly'") as caught:
        open_images(files(tmp_path), "train", stranger)
    assert "data.class_map" in caught.value.hint


@both_kinds
def test_names_in_another_case_are_the_models_if_that_leaves_no_choice(tmp_path: Path, kind: str) -> None:
    write_split(tmp_path, "train", {"wasp": 1, "ant": 1, "bee": 1}, kind)
    model = Eye(3, label_names=["Wasp", "ant", "Bee"])
    reader: Any = open_images(files(tmp_path, kind), "train", model)
    assert {reader.filename(i).split("/")[0]: reader[i][1] for i in range(3)} == {"wasp": 0, "ant": 1, "bee": 2}
    require_known_classes(model, reader)
    with pytest.raises(UsageError, match="the folder 'ant' "):
        open_images(files(tmp_path, kind), "train", Eye(4, label_names=["Wasp", "Ant", "ANT", "Bee"]))


def test_models_that_know_no_names_of_folders_take_the_natural_order(tmp_path: Path) -> None:
    folders = [f"n{i:08}" for i in range(1000)]
    assert order_of(set(folders), None, "", [f"word {i}" for i in range(1000)]) == (
        folders,
        dict(zip(folders, range(1000), strict=True)),
    )
    write_split(tmp_path, "train", {"ant": 1, "bee": 1})
    for model in (Eye(2, label_names=["LABEL_0", "LABEL_1"]), Eye(0, label_names=["x", "y"])):
        assert class_names(open_images(files(tmp_path), "train", model)) == ("ant", "bee")


def test_a_recipe_gives_the_map_beside_it_or_in_place(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "model: {name: vit_tiny_patch16_224}\ndata: {dataset: folder, root: x, class_map: classes.txt}"
    )
    assert Recipe.load(tmp_path / "a.yaml").data.class_map == tmp_path / "classes.txt"
    typed = Recipe.load(tmp_path / "a.yaml", ["data.class_map=other.txt"])
    assert typed.data.class_map == Path.cwd() / "other.txt"
    listed = Recipe.load(tmp_path / "a.yaml", ["data.class_map=[bee, ant, 7]"])
    assert listed.data.class_map == ("bee", "ant", "7")
    assert Recipe.model_validate(listed.plain()) == listed
    assert DataSection(dataset="folder").class_map is None
    assert listed.smoke("vit_tiny_patch16_224", {}).data.class_map is None
