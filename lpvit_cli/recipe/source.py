"""A recipe as it is written: its keys and their lines, and how --set changes them before they are validated."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lpvit_cli.errors import UsageError
from lpvit_cli.recipe.loader import MAX_BYTES, MAX_DEPTH, parse
from lpvit_cli.recipe.model import model_at
from lpvit_cli.recipe.section import absolute

PATHS = {  # keys whose values are paths
    ("model", "weights"),
    ("data", "root"),
    ("data", "class_map"),
    ("prune", "profile"),
    ("finetune", "distill", "teacher", "weights"),
    ("bench", "baseline"),
}
MODELS = {("model", "name"), ("finetune", "distill", "teacher", "name")}  # keys whose values may hold a path
RENAMED = {  # keys of lpvit 0.1
    ("bench", "threads"): "target.threads",
    ("export", "threads"): "target.threads",
    ("export", "batch_size"): "target.batch_size",
    ("profile", "batch_size"): "target.batch_size",
}


def read_text(path: Path) -> str:
    """A recipe file as it is written. Raises UsageError where it is no UTF-8 text."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)  # a longer one is refused, whatever follows
        return raw.decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", "check the path and its permissions") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text: {error.reason}", "save it as UTF-8") from error


def read_source(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """What a recipe file holds, and "file:line" of every key. Raises UsageError where it is no YAML mapping."""
    content, lines = parse(read_text(path), str(path), "compare: lpvit recipes show digits_vit")
    if not isinstance(content, dict):
        raise UsageError(
            f"{path}: a recipe is a YAML mapping, this is {type(content).__name__}", "compare: lpvit recipes show digits_vit"
        )
    return content, {key: f"{path}:{line}" for key, line in lines.items()}


def is_profile_name(text: str) -> bool:
    """Whether this is the name of a saved device profile, and no path."""
    return re.fullmatch(r"[A-Za-z0-9_-]+", text) is not None


def apply_override(content: dict[str, Any], override: str) -> tuple[str, ...]:
    """Set one dotted key; return it as a tuple."""
    dotted, equals, text = override.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not equals or not all(keys):
        raise UsageError(f"--set {override}: not of the form key=value", "for example: --set prune.block=[64,32]")
    if len(keys) > MAX_DEPTH:
        raise UsageError(f"--set {override}: no key has that many parts", "for example: --set prune.block=[64,32]")
    value, _ = parse(text, f"--set {dotted.strip()}", "quote it for your shell")
    node = content
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise UsageError(f"--set {override}: {key!r} is a value, not a section", f"set it whole: --set {key}=...")
        node = child
    if keys[:2] == ("prune", "budget") and len(keys) == 3:
        node.clear()  # a budget is one of several kinds: naming one replaces the other
    if keys in PATHS and isinstance(value, str) and not (keys == ("prune", "profile") and is_profile_name(value)):
        value = _of_shell(override, lambda: str(absolute(Path(value), Path.cwd())))
    if keys in MODELS and isinstance(value, str):
        value = _of_shell(override, lambda: model_at(value, Path.cwd()))
    node[keys[-1]] = value
    return keys


def _of_shell(override: str, path: Callable[[], str]) -> str:
    """A path that was typed in a shell counts from the current folder."""
    try:
        return path()
    except ValueError as error:
        raise UsageError(f"--set {override}: {error}", "give another path") from error
