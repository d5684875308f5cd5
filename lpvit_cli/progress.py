"""How library code tells that it goes on: it calls a function that it was given, and prints nothing."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]  # what is being done, steps done, steps in all, detail


def silent(what: str, done: int, total: int, detail: str) -> None:
    """Tells nobody."""
