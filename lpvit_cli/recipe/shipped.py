"""Recipes by name: those that ship with lpvit."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from lpvit_cli.errors import UsageError
from lpvit_cli.recipe.section import recipes_folder


def shipped_recipes() -> list[Path]:
    return sorted(recipes_folder().glob("*.yaml"))


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a recipe. Raises UsageError, with the nearest name, where there is none."""
    path = Path(path_or_name)
    if os.path.isfile(path):  # False for any name, however long
        return path.resolve()
    shipped = {p.stem: p for p in shipped_recipes()}
    if str(path_or_name) in shipped:
        return shipped[str(path_or_name)]
    near = difflib.get_close_matches(path.stem[:100], shipped, n=1)
    raise UsageError(
        f"no recipe {str(path_or_name)!r}: neither a file nor a shipped recipe",
        f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(shipped)}",
    )
