"""Reports as a terminal shows them."""

from __future__ import annotations

from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

from made import FOLDER, deit_base_layers, prune

from lpvit_cli.cli.console import Console
from lpvit_cli.report.html import write_html
from lpvit_cli.report.schema import BenchReport, FinetuneReport, PruneReport, Report
from lpvit_cli.report.terminal import render

HOSTILE = ["[red]", "[/red]", "[bold]b[/bold]", "<script>alert(1)</script>", "a & b", "\\"]


def printed(*renderables: Any, width: int = 80) -> str:
    """As the command line prints them, on a terminal of `width` columns."""
    out = StringIO()
    console = Console()
    console.out.file, console.out.width = out, width
    console.human(*renderables)
    return out.getvalue()


def shown(report: Report, folder: Path = FOLDER, width: int = 80) -> str:
    return printed(*render(report, folder), width=width)


def words(text: str) -> str:
    """Without line breaks and columns' padding, which depend on the width."""
    return " ".join(text.split())


class Page(HTMLParser):
    """What a browser would make of a page: its tags, its visible text, and every row of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.rows, self.cell = "", [], False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self.cell = tag in ("td", "th")
        if self.cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cell:
            self.rows[-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page(folder: Path, report: BenchReport, pruned: PruneReport | None = None, finetuned: FinetuneReport | None = None) -> str:
    write_html(folder / "report.html", "deit_base_50", report, pruned or prune(layers=deit_base_layers(1)), finetuned)
    return (folder / "report.html").read_text(encoding="utf-8")
