"""The files that export writes, one module for each format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpvit_cli.errors import UsageError
from lpvit_cli.registry import FORMATS

if TYPE_CHECKING:
    from lpvit_cli.export.formats.base import Format


def with_what_they_need(asked: tuple[str, ...]) -> dict[str, Format]:
    """The formats by name, each after what it is made of; hub last, whose card tells of the others."""
    chosen = {name: FORMATS.get(name)() for name in FORMATS.names() if name in asked}
    needed = {one.made_of for one in chosen.values() if one.made_of}
    whole = {name: FORMATS.get(name)() for name in FORMATS.names() if name in needed} | chosen
    return dict(sorted(whole.items(), key=lambda item: (item[0] not in needed, item[0] == "hub")))


def require_possible(formats: dict[str, Format], precision: str) -> None:
    """Raise UsageError for a precision that a format does not know, EnvironmentFault for what this machine lacks."""
    if unable := sorted(name for name, one in formats.items() if precision not in one.precisions):
        able = formats[unable[0]].precisions[0]
        raise UsageError(
            f"export.precision: {', '.join(unable)} is written in {able} only, not in {precision}",
            f"leave them out of export.formats, or add --set export.precision={able}",
        )
    for format_ in formats.values():
        format_.require()


def unasked(formats: dict[str, Format], asked: tuple[str, ...]) -> list[str]:
    """A note on formats that are written because others are made of them."""
    more = [name for name in formats if name not in asked]
    needing = sorted(name for name in asked if formats[name].made_of in more)
    return [f"{', '.join(needing)} needs the ONNX file: it was written too"] if more else []
