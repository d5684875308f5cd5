"""A sample of `make stress`: whatever a recipe holds, it is loaded, or refused in words."""

from __future__ import annotations

from pathlib import Path

import hostile_recipes
import pytest
from hostile_recipes import TOP, VALUES

from lpvit_cli import Recipe
from lpvit_cli.errors import UsageError


def told(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        Recipe.load(path)
    return caught.value.message.removeprefix(f"{path}")


def test_hostile_values(tmp_path: Path) -> None:
    tally = hostile_recipes.hostile(tmp_path, ("data.root",))
    assert not tally.broken, tally.examples
    assert tally.tried > 90


def test_mutations(tmp_path: Path) -> None:
    tally = hostile_recipes.mutations(tmp_path, range(200))
    assert not tally.broken, tally.examples
    assert 0 < tally.refused < tally.tried


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("date that is none", ":3: seed: should be a valid integer"),
        ("octal that is none", ":3: not a value of type int"),
        ("binary", ":3: not valid YAML: could not determine a constructor for the tag"),
        ("huge integer", ":3: a number of more than 100 characters"),
        ("more than 64 bits", ":3: a whole number of more than 64 bits"),
        ("self", ":3: the alias *a has no meaning yet"),
        ("self in a merge", ":3: the alias *a has no meaning yet"),
        ("deep list", ":3: nested deeper than 50 levels"),
        ("terminal escape", ":3: text with the control character '\\x1b'"),
        ("text turned around", ":3: text with the control character '\\u202e'"),
        ("raw terminal escape", ":3: the character '\\x1b' is not allowed"),
        ("key that is a list", ":3: a key that is a list or a mapping"),
    ],
)
def test_values_are_told_with_their_line(tmp_path: Path, value: str, said: str) -> None:
    assert told(tmp_path / "mine.yaml", f"{TOP}seed: {VALUES[value]}\n").startswith(said)


def test_files_are_told_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(hostile_recipes.FILES["not UTF-8"])
    with pytest.raises(UsageError, match=f"{path}:1: not UTF-8 text"):
        Recipe.load(path)
    assert told(path, hostile_recipes.NINES).startswith(":6: more than 100,000 values")
    assert told(path, "# " + "x" * 2**21) == ": larger than 1 MiB"


def test_paths_that_no_file_can_have(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert ":3: data.root: ~nosuchuser: " in told(path, "model: {name: x}\ndata:\n  root: ~nosuchuser\n  dataset: folder\n")
    assert "name too long" in told(path, f"model: {{name: x}}\ndata:\n  root: {'x' * 5000}\n  dataset: folder\n")
    with pytest.raises(UsageError, match="^--set data.root=~nosuchuser: "):
        Recipe.load("digits_vit", ["data.root=~nosuchuser"])


@pytest.mark.parametrize("name", ["..", ".", "...", "a/b", "x" * 300])
def test_names_are_folders_of_their_own(tmp_path: Path, name: str) -> None:
    assert ":3: name: " in told(tmp_path / "mine.yaml", f"{TOP}name: {name}\n")


def test_aliases_stay(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{TOP}prune: {{block: &b [16, 8], layers: &l {{include: [a]}}}}\nexport: &e {{opset: 21}}\n")
    assert Recipe.load(path).prune.block == (16, 8)
    path.write_text(
        "model: &m {name: x}\ndata: {dataset: digits}\nfinetune: {distill: {teacher: {<<: *m, pretrained: true}}}\n"
    )
    teacher = Recipe.load(path).finetune.distill.teacher  # type: ignore[union-attr]
    assert (teacher.name, teacher.pretrained) == ("x", True)  # type: ignore[union-attr]
