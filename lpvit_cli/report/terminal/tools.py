"""What the terminal shows of doctor and of the list of recipes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text


def findings_table(findings: Iterable[Any]) -> Table:
    rows = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        mark = Text("ok", "green") if finding.ok else Text("--", "yellow")
        remedy = f"\n{finding.remedy}" if finding.remedy and not finding.ok else ""
        rows.add_row(mark, finding.what, Text.assemble(finding.detail, (remedy, "dim")))
    return rows


def recipes_table(paths: Iterable[Path]) -> Table:
    """Name and the first sentence of the comment that opens each recipe."""
    rows = Table(box=None, pad_edge=False, show_header=False)
    for path in paths:
        comments = [line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#")]
        about = " ".join(line for line in comments[1:] if line).split(". ")[0].rstrip(".")
        rows.add_row(Text(path.stem, "bold"), about)
    return rows
