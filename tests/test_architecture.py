"""The house as it is built: which way imports point, that nothing goes in a circle, and that files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lpvit_cli"
FLOORS = (  # from the roof to the ground: a room imports rooms of its own floor and of those below
    ("__main__",),
    ("cli",),
    ("commands", "stages", "api"),
    ("report",),
    ("bench", "export", "recovery", "pruning"),
    ("curvature", "targets", "tasks"),
    ("data",),
    ("models", "numbers", "pipeline"),
    ("sparse", "tokens"),
    ("measure",),
    ("devices", "recipe"),
    ("machine", "registry", "distributed", "files", "progress", "randomness"),
    ("errors",),
)


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PACKAGE.rglob("*.py")
    }


def imports_of(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & known) or ({node.module} & known)
    return found


MODULES = modules()
IMPORTS = {name: imports_of(path, set(MODULES)) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_a_floor() -> None:
    rooms = {room(name) for name in MODULES} - {""}
    assert rooms == {name for floor in FLOORS for name in floor}


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_no_import_points_upward(module: str) -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    if not room(module):
        return
    upward = [other for other in IMPORTS[module] if room(other) and floor[room(other)] < floor[room(module)]]
    assert not upward


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """A way back to where it began, if there is one."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def imported_when_loaded(path: Path, known: set[str]) -> set[str]:
    """As `imports_of`, without what is for the type checker only."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))]
    kept = path.with_suffix(".loaded")
    text = ast.unparse(tree)
    del kept
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & known) or ({node.module} & known)
    return found


def test_no_file_imports_itself_in_a_circle() -> None:
    graph = {name: imported_when_loaded(path, set(MODULES)) - {name} for name, path in MODULES.items()}
    assert circle_in(graph) == []


def test_no_room_imports_another_that_imports_it() -> None:
    rooms: dict[str, set[str]] = {}
    for name, others in IMPORTS.items():
        if room(name):
            rooms.setdefault(room(name), set()).update(room(other) for other in others if room(other) != room(name))
    assert circle_in({name: {other for other in others if other} for name, others in rooms.items()}) == []


def test_a_circle_would_be_found() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c", "a"]


@pytest.mark.parametrize("path", sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]), ids=lambda p: p.stem)
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_stages_are_thin() -> None:
    assert sum(len(path.read_text().splitlines()) for path in (PACKAGE / "stages").glob("*.py")) <= 900


@pytest.mark.parametrize(
    "folder", ["pruning", "recovery", "bench", "export", "targets", "tasks", "measure", "models", "sparse"]
)
def test_library_code_takes_no_recipe(folder: str) -> None:
    """Sections are values that anybody may make; the recipe as a whole belongs to stages."""
    taken = {name: others & {"lpvit_cli.recipe", "lpvit_cli.recipe.schema"} for name, others in IMPORTS.items()}
    assert not [name for name, recipe in taken.items() if recipe and room(name) == folder]


@pytest.mark.parametrize("module", ["lpvit_cli", "lpvit_cli.stages", "lpvit_cli.registry", "lpvit_cli.recipe"])
def test_what_the_command_line_needs_at_once_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
