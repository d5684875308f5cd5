"""docs/ says what is so: the recipe reference is made from the schema, and describes every key."""

from __future__ import annotations

from collections.abc import Iterator

import make_docs
import pytest
from pydantic import BaseModel

from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.section import Section
from lpvit_cli.registry import BUDGETS, FORMATS, METHODS


def sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from sections(kind)


SECTIONS = {section.__name__: section for section in sections(Recipe)}


def test_the_recipe_reference_is_current() -> None:
    assert make_docs.PAGE.read_text() == make_docs.page(), "run: python scripts/make_docs.py"


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_is_described(name: str) -> None:
    """By a comment that stands with the field, or in the section's docstring."""
    section = SECTIONS[name]
    told = make_docs.field_comments(section)
    unsaid = [key for key in section.model_fields if not told.get(key) and f"`{key}`" not in (section.__doc__ or "")]
    assert not unsaid


def test_the_reference_has_every_key_and_choice() -> None:
    page = make_docs.page()
    keys = Recipe.model_validate({"name": "x", "model": {"name": "x"}, "data": {"dataset": "x"}}).leaves()
    missing = [key for key in (*keys, "finetune.augment.mixup") if f"| `{key}` |" not in page and key != "prune.budget"]
    assert not missing
    for registry in (METHODS, BUDGETS, FORMATS):
        assert all(f"| `{name}` |" in page for name in make_docs.own(registry))


def test_comments_of_a_field() -> None:
    class Example(Section):
        """Comments stand above, behind, or behind and go on below."""

        none: int = 0
        # above
        # two lines
        above: int = 0
        behind: int = 0  # behind
        goes_on: int = 0  # behind, and
        # below
        after: int = 0

    told = make_docs.field_comments(Example)
    assert told == {"none": "", "above": "above two lines", "behind": "behind", "goes_on": "behind, and below", "after": ""}
