"""A recipe as it is written: its keys and their lines, and how --set changes them before they are validated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lpvit_cli.errors import UsageError
from lpvit_cli.recipe.model import model_at

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


def read_source(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """What a recipe file holds, and "file:line" of every key. Raises UsageError where it is no YAML mapping."""
    try:
        source = path.read_text(encoding="utf-8")
        content = yaml.safe_load(source)
        lines = key_lines(yaml.compose(source, Loader=yaml.SafeLoader))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}", "check the path and its permissions") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UsageError(
            f"{where}: not valid YAML: {getattr(error, 'problem', error)}", "fix the syntax at that line"
        ) from error
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
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: {text!r} is not valid YAML", "quote it for your shell") from error
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
        value = str(Path(value).expanduser().resolve())  # typed in a shell: from the current folder
    if keys in MODELS and isinstance(value, str):
        value = model_at(value, Path.cwd())
    node[keys[-1]] = value
    return keys


def key_lines(node: yaml.Node | None, at: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Line of every key, by its path; a key given twice is refused."""
    lines: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*at, str(key.value))
            if path in lines:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            lines[path] = key.start_mark.line + 1
            lines |= key_lines(value, path)
    return lines
