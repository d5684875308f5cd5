"""What is wrong with a recipe, in words: file, line, key, rule, and the nearest valid key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lpvit_cli.errors import UsageError, printable
from lpvit_cli.recipe.source import RENAMED

UNKNOWN_KEY, WRONG_VALUE = "unknown_key", "wrong_value"  # types of errors that a section raises about one of its keys


def explain(
    error: ValidationError,
    schema: type[BaseModel],
    content: dict[str, Any],
    origin: dict[tuple[str, ...], str],
    path: Path,
) -> UsageError:
    """The first problem in words; the number of others."""
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] in ("extra_forbidden", UNKNOWN_KEY)), problems[0])
    keys = _keys_of(first)
    while keys and keys[:-1] and not _holds(content, keys):
        keys = keys[:-1]  # pydantic adds the names of union members behind the key
    above = (origin[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in origin)
    below = (place for key, place in origin.items() if key[: len(keys)] == keys)
    where = next(above, next(below, str(path)))
    dotted = printable(".".join(keys), 200)
    if keys in RENAMED:
        new = RENAMED[keys]
        message, hint = f"{where}: {dotted}: is now {new}", f"write {new}, or pass --set {new}=VALUE"
    elif first["type"] in ("extra_forbidden", UNKNOWN_KEY):
        valid = _valid_keys(schema, keys[:-1])
        near = difflib.get_close_matches(keys[-1][:100], valid, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys here: {', '.join(valid)}"
        message = f"{where}: {dotted}: unknown key"
    elif first["type"] == "missing" and isinstance(first["loc"][-1], str):
        missing = ".".join(str(part) for part in first["loc"])
        message, hint = f"{where}: {missing}: required key is missing", f"add it, or pass --set {missing}=VALUE"
    else:
        same_key = [p for p in problems if _keys_of(p)[: len(keys)] == keys]
        same_key = [p for p in same_key if p["type"] != "too_short"] or same_key  # a list is short of its invalid items
        rules = dict.fromkeys(p["msg"].removeprefix("Value error, ").removeprefix("Input ") for p in same_key)
        rules = {"needs more values": None} if first["type"] == "missing" else rules
        given = first.get("ctx", {}).get("given", first["input"])
        given = "this section" if isinstance(given, dict) else printable(str(given), 200)
        message = f"{where}: {dotted}: {', or '.join(rules)} (given: {given})"
        hint = f"change {dotted}; a valid recipe to compare with: lpvit recipes show digits_vit"
    others = len({_keys_of(p)[: len(keys)] for p in problems}) - 1
    if others > 0:
        message += f"  [and {others} more]"
    return UsageError(message, hint)


def _keys_of(problem: Any) -> tuple[str, ...]:
    """Where the problem is; a section's own validator names the key itself."""
    own = (problem["ctx"]["key"],) if problem["type"] in (UNKNOWN_KEY, WRONG_VALUE) else ()
    return tuple(str(part) for part in (*problem["loc"], *own))


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
    valid: list[str] = section.keys()
    return valid
