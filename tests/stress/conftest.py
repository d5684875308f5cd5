"""Collects what the stress tests tried and what held, and prints it as one table."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS: list[str] = []


@pytest.fixture
def row() -> Callable[[str, int, int, str], None]:
    """Call it with what was tried, how often, how often the promise held, and which promise it is.

    The row is added to the file that $STRESS_TABLE names at once: a run that is cut short has told what it did.
    """

    def add(what: str, tried: int, held: int, promise: str) -> None:
        ROWS.append(f"| {what} | {promise} | {tried:,} | {held:,} |")
        if path := os.environ.get("STRESS_TABLE"):
            with Path(path).open("a") as file:
                file.write(ROWS[-1] + "\n")

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if ROWS:
        terminalreporter.write_sep("=", "tried and held")
        terminalreporter.write_line("\n".join(["| tried | promise | times | held |", "|---|---|---:|---:|", *ROWS]))
