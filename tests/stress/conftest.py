"""Collects what the stress tests tried and what held, and prints it as one table."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS: list[tuple[str, int, int, str]] = []


@pytest.fixture
def row() -> Callable[[str, int, int, str], None]:
    """Call it with what was tried, how often, how often the promise held, and which promise it is."""
    return lambda what, tried, held, promise: ROWS.append((what, tried, held, promise))


def table() -> list[str]:
    lines = [f"| {what} | {promise} | {tried:,} | {held:,} |" for what, tried, held, promise in ROWS]
    return ["| tried | promise | times | held |", "|---|---|---:|---:|", *lines]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Also into the file that $STRESS_TABLE names."""
    if not ROWS:
        return
    terminalreporter.write_sep("=", "tried and held")
    terminalreporter.write_line("\n".join(table()))
    if path := os.environ.get("STRESS_TABLE"):
        Path(path).write_text("\n".join(table()) + "\n")
