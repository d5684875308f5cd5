"""What tells a stage that the model of the same name is another one now."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lpvit_cli.files import content_id
from lpvit_cli.pipeline.record import values_of
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.content import model_content


def test_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = model_content(f"transformers:{tmp_path}")
    assert before == model_content(f"transformers:{tmp_path}")
    weights.write_bytes(b"two")
    assert model_content(f"transformers:{tmp_path}") != before
    assert list(model_content("transformers:owner/name")) == ["version of transformers"]
    assert model_content("vit_tiny_patch16_224") == {}


@pytest.mark.parametrize("file", ["own_net.py", "own_net/deep.py"])
def test_the_source_of_your_own_module_which_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / file
    source.parent.mkdir(exist_ok=True)
    if "/" in file:
        (source.parent / "__init__.py").write_text("raise SystemExit")
    name = "module:" + file.removesuffix(".py").replace("/", ".") + ":build"
    found = []
    for text in ("raise SystemExit", "raise SystemExit", "raise KeyError"):
        source.write_text(text)
        found.append(model_content(name))
    assert found[0] == found[1] != found[2]
    assert "own_net" not in sys.modules
    assert model_content("module:nowhere.at_all:build") == {}


def test_it_counts_where_the_name_was_read(tmp_path: Path) -> None:
    model = {"name": f"transformers:{tmp_path}"}
    (tmp_path / "config.json").write_text("{}")
    recipe = Recipe.model_validate({"name": "x", "model": model, "data": {"dataset": "digits"}})
    assert "model.name (content)" in values_of(recipe, ["model.name"], content_id)
    assert values_of(recipe, ["seed"], lambda path: None) == {"seed": 0}
