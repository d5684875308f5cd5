"""Names of classes: in which order they are labels, and whether there are any."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpvit_cli.errors import UsageError


def natural(name: str) -> tuple[list[Any], str]:
    """Sorts a2 before a10, and a before B, as timm does; names that differ in case or leading zeros only, by the very name."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if at % 2 else part for at, part in enumerate(parts)], name


def order_of(
    folders: set[str], given: Sequence[str] | None, where: str, known: Sequence[str] | None
) -> tuple[list[str], dict[str, int]] | None:
    """The names of classes in label order, and the label of every folder: as the user gives them in `where`; as the model knows
    them, in upper or lower case; else in natural order. None: these folders are no classes, since images lie beside them ("")
    or there is only one.

    Raises UsageError where a folder is not among the names that the user gives, or that the model knows.
    """
    if "" in folders:
        return None
    if given is not None:
        if missing := sorted(folders - set(given), key=natural):
            raise UsageError(
                f"data.class_map: {where} has no class {missing[0]!r}, which is a folder of images",
                "add it, or remove the folder",
            )
        return _labelled(given)
    if known and (labels := _as_known(folders, known)):
        return list(known), labels
    if len(folders) < 2:
        return None
    ordered = sorted(folders, key=natural)
    if known and not _are_synsets(ordered):
        _refuse(ordered, known)
    return _labelled(ordered)


def _labelled(names: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    return list(names), {name: label for label, name in enumerate(names)}


def _as_known(folders: set[str], known: Sequence[str]) -> dict[str, int] | None:
    """The labels of folders that all have names of the model's, but for their case where that leaves no choice; else None."""
    exact = {name: label for label, name in enumerate(known)}
    if folders <= set(exact):
        return exact
    folded = {name.casefold(): label for label, name in enumerate(known)}
    wanted = {folder.casefold() for folder in folders}
    if len(folded) < len(known) or len(wanted) < len(folders) or not wanted <= set(folded):
        return None
    return {folder: folded[folder.casefold()] for folder in folders}


def _refuse(folders: Sequence[str], known: Sequence[str]) -> None:
    strange = next((name for name in folders if name not in known), folders[0])
    unused = next((name for name in known if name not in folders), known[0])
    raise UsageError(
        f"data: the folder {strange!r} has no name of the model's classes, which knows {unused!r} for example",
        "give data.class_map, the folders in the order of the model's labels;"
        " if these are no classes: --set data.labels=none, or evaluate --labels none",
    )


def read_class_map(given: Path | tuple[str, ...]) -> tuple[list[str], str]:
    """The names in label order, and where they come from in words. Raises UsageError where they are no order of classes."""
    where = "the list" if isinstance(given, tuple) else str(given)
    names = list(given) if isinstance(given, tuple) else _read(given)
    if repeated := sorted(name for name in set(names) if names.count(name) > 1):
        raise UsageError(f"data.class_map: {where} names {repeated[0]!r} twice", "name every class once")
    return names, where


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return _of_json(json.loads(text)) if path.suffix.lower() == ".json" else _of_lines(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data.class_map: {path}: cannot be read: {error}", "check the path") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"data.class_map: {path}: {error}", 'write {"name": index} with indices from 0 on, or a list of names'
        ) from error


def _of_json(content: Any) -> list[str]:
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    if isinstance(content, dict) and sorted(content.values(), key=str) == sorted(range(len(content)), key=str):
        return sorted(content, key=content.__getitem__)
    raise ValueError("neither names of classes nor a mapping of names to the indices 0, 1, 2 ...")


def _of_lines(text: str) -> list[str]:
    """One name a line; or all lines end in an index, behind a space or comma, and these are 0, 1, 2 ... in any order."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pairs = [match.groups() for line in lines if (match := re.fullmatch(r"(.*\S)\s*[\s,]\s*(\d+)", line))]
    indexed = {int(index): name.rstrip(",").strip() for name, index in pairs}
    if lines and len(pairs) == len(lines) and sorted(indexed) == list(range(len(lines))):
        return [indexed[index] for index in range(len(lines))]
    return lines


def in_words(ordered: Sequence[str]) -> tuple[str, ...]:
    """The names themselves; ImageNet's thousand synset ids are put into words."""
    if _are_synsets(ordered):
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return tuple(info.label_name_to_description(name) for name in ordered)
    return tuple(str(name) for name in ordered)


def _are_synsets(names: Sequence[str]) -> bool:
    """Whether these are ImageNet's thousand: models have words for them, in the natural order of the ids."""
    return len(names) == 1000 and all(name.startswith("n") and name[1:].isdigit() for name in names)
