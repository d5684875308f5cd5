"""Tables and numbers as the terminal shows them."""

from __future__ import annotations

from rich.table import Table


def table(title: str, *columns: str) -> Table:
    """Text to the left in the first column, numbers to the right in the others."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    made.min_width = len(title)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right")
    return made


def numbers(title: str, *columns: str) -> Table:
    """Numbers are never cut. Few enough columns leave the names whole in 80; a longer name continues on the next line."""
    rows = table(title, *columns)
    rows.columns[0].overflow = "fold"
    for column in rows.columns[1:]:
        column.no_wrap = True
    return rows
