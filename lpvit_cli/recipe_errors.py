"""What is wrong with a recipe, in words: file, line, key, rule, and the nearest valid key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lpvit_cli.errors import UsageError


def explain(
    error: ValidationError,
    schema: type[BaseModel],
    content: dict[str, Any],
    origin: dict[tuple[str, ...], str],
    path: Path,
) -> UsageError:
    """The first problem in words; the number of others."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    keys = tuple(str(part) for part in first["loc"])
    while keys and keys[:-1] and not _holds(content, keys):
        keys = keys[:-1]  # pydantic adds the names of union members behind the key
    above = (origin[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in origin)
    below = (place for key, place in origin.items() if key[: len(keys)] == keys)
    where = next(above, next(below, str(path)))
    dotted = ".".join(keys)
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(schema, keys[:-1])
        near = difflib.get_close_matches(keys[-1], valid, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys here: {', '.join(valid)}"
        message = f"{where}: {dotted}: unknown key"
    elif first["type"] == "missing" and isinstance(first["loc"][-1], str):
        missing = ".".join(str(part) for part in first["loc"])
        message, hint = f"{where}: {missing}: required key is missing", f"add it, or pass --set {missing}=VALUE"
    else:
        same_key = [p for p in problems if tuple(str(part) for part in p["loc"])[: len(keys)] == keys]
        same_key = [p for p in same_key if p["type"] != "too_short"] or same_key  # a list is short of its invalid items
        rules = dict.fromkeys(p["msg"].removeprefix("Value error, ").removeprefix("Input ") for p in same_key)
        rules = {"needs more values": None} if first["type"] == "missing" else rules
        given = first["input"] if not isinstance(first["input"], dict) else "this section"
        message = f"{where}: {dotted}: {', or '.join(rules)} (given: {given})"
        hint = f"change {dotted}; a valid recipe to compare with: lpvit recipes show digits_vit"
    others = len({p["loc"][: len(keys)] for p in problems}) - 1
    if others > 0:
        message += f"  [and {others} more]"
    return UsageError(message, hint)


def _holds(content: Any, keys: tuple[str, ...]) -> bool:
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            return False
        content = content[key]
    return True


def _valid_keys(schema: type[BaseModel], keys: tuple[str, ...]) -> list[str]:
    section: Any = schema
    for key in keys:
        options = [section.model_fields[key].annotation, *getattr(section.model_fields[key].annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)
