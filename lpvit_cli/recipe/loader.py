"""YAML as recipes hold it: within limits that are checked before anything is built, and only of the types that JSON has."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.reader import Reader

from lpvit_cli.errors import CONTROL, UsageError

MAX_BYTES = 2**20  # of a recipe
MAX_DEPTH = 50  # of nested collections
MAX_NODES = 100_000  # keys, values and collections, those counted again that aliases repeat
MAX_DIRECTIVES = 10  # libyaml compares each with all before it
MAX_DIGITS = 100  # characters of a number
TAG = "tag:yaml.org,2002:"
TYPES = ("null", "bool", "int", "float", "str", "seq", "map")
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's takes a twentieth of the time
Lines = dict[tuple[str, ...], int]


class Refused(yaml.MarkedYAMLError):
    """Valid YAML that no recipe needs."""


@dataclass
class _Size:
    nodes: int = 0
    depth: int = 0
    anchor: str | None = None


class _Loader(_Base):
    """Dates stay text, and a tag of another type is an error. Whatever building a value raises is told with its line."""

    yaml_constructors = {tag: make for tag, make in _Base.yaml_constructors.items() if tag in (None, *(TAG + t for t in TYPES))}  # noqa: RUF012
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in rules if tag != f"{TAG}timestamp"]
        for first, rules in _Base.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = str(node.tag).removeprefix(TAG)
        if kind in ("int", "float") and len(node.value) > MAX_DIGITS:
            raise _refused(f"a number of more than {MAX_DIGITS} characters", node)
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # int("08", 8), an empty !!float and the like
            raise _refused(f"not a value of type {kind}", node) from error
        if isinstance(value, int) and abs(value) >= 2**63:
            raise _refused("a whole number of more than 64 bits", node)
        if isinstance(value, str) and (found := CONTROL.search(value)):
            raise _refused(f"text with the control character {found[0]!r}", node)
        return value


def parse(text: str, place: str, hint: str) -> tuple[Any, Lines]:
    """What a YAML text holds, and the line of every key.

    Raises UsageError, at a line of `place`, where the text is no YAML, or more than a recipe can need.
    """
    try:
        _within_limits(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines = dict(_key_lines(node, ()))
            return (None if node is None else loader.construct_document(node)), lines
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = "" if isinstance(error, Refused) else "not valid YAML: "
        where = f"{place}:{mark.line + 1}" if mark else place
        raise UsageError(f"{where}: {what}{getattr(error, 'problem', None) or error}", hint) from error


def _within_limits(text: str) -> None:
    """Raises Refused for texts that are too large, deep or repetitive, and for an alias inside what it stands for."""
    if found := Reader.NON_PRINTABLE.search(text):
        mark = yaml.Mark("", 0, text.count("\n", 0, found.start()), 0, None, 0)
        raise Refused(problem=f"the character {found[0]!r} is not allowed", problem_mark=mark)
    if len(text.encode()) > MAX_BYTES:
        raise Refused(problem=f"larger than {MAX_BYTES // 2**20} MiB")
    if len(re.findall("^%", text, re.MULTILINE)) > MAX_DIRECTIVES:
        raise Refused(problem=f"more than {MAX_DIRECTIVES} lines begin with %")
    sizes: dict[str, _Size] = {}  # of what has an anchor
    around = [_Size()]  # collections that are open, so far
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            around.append(_Size(1, 1, event.anchor))
            size = _Size()
        elif isinstance(event, yaml.CollectionEndEvent):
            size = around.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size = _Size(1, 0, event.anchor)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _refused(f"the alias *{event.anchor} has no meaning yet", event)
            size = dataclasses.replace(sizes[event.anchor], anchor=None)
        else:
            continue
        if size.anchor:
            sizes[size.anchor] = size
        around[-1].nodes += size.nodes
        around[-1].depth = max(around[-1].depth, size.depth + 1)
        if len(around) - 1 + size.depth > MAX_DEPTH:
            raise _refused(f"nested deeper than {MAX_DEPTH} levels", event)
        if around[-1].nodes > MAX_NODES:
            raise _refused(f"more than {MAX_NODES:,} values", event)


def _key_lines(node: yaml.Node | None, at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every key by its path, and its line; a key given twice is refused."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refused("a key that is a list or a mapping", key)
        if key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
        seen.add(key.value)
        yield (*at, key.value), key.start_mark.line + 1
        yield from _key_lines(value, (*at, key.value))


def _refused(problem: str, at: Any) -> Refused:
    return Refused(problem=problem, problem_mark=at.start_mark)
