"""Write docs/recipe.md: every key of a recipe, from the schema in lpvit_cli/recipe and the registries.

    python scripts/make_docs.py

Descriptions are the docstrings of sections and the comments that stand with their fields, so that each is written once.
tests/test_docs.py fails while docs/recipe.md is not what this makes.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recipe.prune import Budget
from lpvit_cli.recipe.source import RENAMED
from lpvit_cli.registry import BUDGETS, FORMATS, METHODS, Registry

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
HEAD = """<!-- made by scripts/make_docs.py from lpvit_cli/recipe and lpvit_cli/registry.py: change those -->
# Recipe reference

A recipe is one YAML file. It says which model, which data, where the model will run, and what every stage does.
`model.name` and `data.dataset` are required; every other key has a default.

```yaml
name: mine
model: {name: deit_small_patch16_224.fb_in1k, pretrained: true}
data: {dataset: folder, root: /path/to/imagenet}
prune: {block: [128, 32], budget: {flops: 0.5}}
```

* RECIPE on the command line is a file or the name of a shipped recipe (`lpvit recipes list`).
* `--set KEY=VALUE` changes one key; VALUE is YAML. A dotted KEY leads into a section: `--set prune.block=[128,32]`.
* A relative path counts from the recipe's folder; a path of `--set` counts from the current folder.
* An unknown key or a wrong value is exit code 2. The message names file, line, key, rule, and the nearest valid key.
* `lpvit recipes validate RECIPE` checks a recipe; `lpvit recipes show RECIPE --json` prints it with every default.
* A stage records the keys that it reads. It runs again when one of their values has changed, and not otherwise.

```sh
lpvit recipes list
lpvit recipes validate digits_vit --set prune.budget.flops=0.4
```
"""
NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", Any: "any", NoneType: "null"}


def page() -> str:
    """The whole of docs/recipe.md."""
    parts = [HEAD, *_sections(Recipe, ""), _budgets()]
    parts += [_registered("Pruning methods", "prune.method", METHODS), _registered("Export formats", "export.formats", FORMATS)]
    return re.sub(r"\bNone\b", "null", "\n".join([*parts, _renamed()]))  # as YAML has it


# sections


def _sections(section: type[BaseModel], at: str) -> Iterator[str]:
    """This section and those below it, each once, as a heading, its docstring and a table of its keys."""
    comments = field_comments(section)
    rows, below = [], []
    for name, field in section.model_fields.items():
        key = f"{at}.{name}" if at else name
        inner = _section_in(field.annotation)
        if inner is None or inner is Budget:
            rows.append(_row(key, _type(field.annotation, field.metadata), _default(field), comments.get(name, "")))
        else:
            place = "model" if inner is ModelSection else key  # a teacher is written as the model is
            rows.append(_row(key, _section_type(field, place), _default(field), comments.get(name, "")))
            below += [(inner, key)] if place == key else []
    heading = f"## {at}" if at else "## Top level"
    yield "\n".join(["", heading, "", inspect.cleandoc(section.__doc__ or ""), "", *_table(rows)])
    for inner, key in below:
        yield from _sections(inner, key)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _section_type(field: FieldInfo, key: str) -> str:
    optional = " or null" if NoneType in get_args(field.annotation) else ""
    return f"[section](#{key.replace('.', '').replace('_', '_')}){optional}"


def _table(rows: list[str]) -> list[str]:
    return ["| key | type | default | |", "|---|---|---|---|", *rows]


def _row(key: str, kind: str, default: str, text: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{key}`", kind, default, text)) + " |"


# types and defaults, in words


def _type(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    rules = " and ".join(filter(None, map(_rule, metadata)))
    choices = next((registry for registry in map(_registry, metadata) if registry), None)
    if choices:
        return ", ".join(f"`{name}`" for name in own(choices))
    return f"{_plain_type(annotation)} {rules}".strip().replace(f" or null {rules}", f" {rules} or null")


def _plain_type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is Budget:
        return "[`{kind: value}`](#budgets)"
    if origin is Annotated:
        return _type(inner[0], inner[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_plain_type(kind) for kind in inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return f"list of {_plain_type(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(_plain_type(kind) for kind in inner)}]"
    if origin is dict:
        return f"mapping of {_plain_type(inner[0])} to {_plain_type(inner[1])}"
    return NAMES[annotation]


def _rule(constraint: Any) -> str:
    if isinstance(constraint, FieldInfo):
        return " and ".join(filter(None, map(_rule, constraint.metadata)))
    if isinstance(constraint, annotated_types.MinLen):
        return "(not empty)"
    if (pattern := getattr(constraint, "pattern", None)) is not None:
        return f"matching `{pattern}`"
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return next((f"{sign} {getattr(constraint, name):g}" for name, sign in signs.items() if hasattr(constraint, name)), "")


def _registry(constraint: Any) -> Registry | None:
    """The registry whose names are the choices, where one validates the field."""
    owner = getattr(constraint.func, "__self__", None) if isinstance(constraint, AfterValidator) else None
    return owner if isinstance(owner, Registry) else None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel) and not isinstance(value, Budget):
        return ""
    value = value.model_dump() if isinstance(value, Budget) else value
    text = yaml.safe_dump(_as_lists(value), default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"`{text}`"


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


# descriptions, from the source


def field_comments(section: type) -> dict[str, str]:
    """By field, the comment that stands above it, behind it, and goes on below the one behind it."""
    source = inspect.getsource(section)
    comments = {
        token.start[0]: (token.string.removeprefix("#").strip(), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, str] = {}
    for node in ast.parse(textwrap.dedent(source)).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = [*_above(node.lineno, comments), *_behind(node.end_lineno or node.lineno, comments)]
            found[node.target.id] = " ".join(lines)
    return found


def _above(line: int, comments: dict[int, tuple[str, bool]]) -> list[str]:
    """Lines of comment only, above a field, unless they go on from one behind the field before."""
    lines: list[str] = []
    while comments.get(line - 1, ("", False))[1]:
        line -= 1
        lines.insert(0, comments[line][0])
    return [] if line - 1 in comments else lines


def _behind(line: int, comments: dict[int, tuple[str, bool]]) -> list[str]:
    if line not in comments:
        return []
    lines = [comments[line][0]]
    while comments.get(line + 1, ("", False))[1]:
        line += 1
        lines.append(comments[line][0])
    return lines


# registries


def own(registry: Registry) -> list[str]:
    """The names that lpvit itself brings, whatever else is installed."""
    return [name for name in registry.names() if registry.get(name).__module__.startswith("lpvit_cli.")]


def _first_sentence(thing: Any, name: str) -> str:
    """What the first line of the thing's file says of it."""
    text = inspect.cleandoc(sys.modules[thing.__module__].__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return text.removeprefix(f"{name}: ")


def _budgets() -> str:
    rows = []
    for name in own(BUDGETS):
        kind = BUDGETS.get(name)
        limits = {"> {:g}": kind.above, "≥ {:g}": kind.least, "< {:g}": kind.below, "≤ {:g}": kind.most}
        rule = " and ".join(text.format(limit) for text, limit in limits.items() if limit is not None)
        needs = "a device profile" if kind.needs_profile else "pruned models, evaluated" if kind.is_searched else ""
        rows.append(f"| `{name}` | number {rule} | {needs} | {_first_sentence(kind, name)} |")
    text = inspect.cleandoc(Budget.__doc__ or "")
    return "\n".join(["", "## Budgets", "", text, "", "| kind | value | needs | counts |", "|---|---|---|---|", *rows])


def _registered(title: str, key: str, registry: Registry) -> str:
    rows = [f"| `{name}` | {_first_sentence(registry.get(name), name)} |" for name in own(registry)]
    return "\n".join(["", f"## {title}", "", f"Values of `{key}`.", "", "| name | |", "|---|---|", *rows])


def _renamed() -> str:
    rows = [f"| `{'.'.join(old)}` | `{new}` |" for old, new in RENAMED.items()]
    text = "A recipe with an old key is answered with the new one."
    return "\n".join(["", "## Keys of lpvit 0.1", "", text, "", "| old | new |", "|---|---|", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
