"""What pyproject.toml promises an installer."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
REQUIRED = {one.name: one for one in map(Requirement, (line for group in GROUPS for line in group)) if one.name != "lpvit"}
BOUNDED = ("torch", "torchvision", "timm", "onnxruntime")

COME_ALONG = {"triton", "pydantic-core"}  # with torch (where there is one) and pydantic, of the one version that fits


def imported(folder: str) -> set[str]:
    """The top-level packages that the files below import, at their top or inside functions."""
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found


def test_what_is_imported_is_declared() -> None:
    """Of what is installed here."""
    known = packages_distributions()
    declared = {_canonical(name) for name in REQUIRED} | COME_ALONG
    packages = imported("lpvit_cli") | imported("kernels")
    for package in sorted(packages - sys.stdlib_module_names - {"lpvit_cli", "lpvit_kernels"}):
        distributions = {_canonical(name) for name in known.get(package, [])}
        assert not distributions or distributions & declared, f"{package} is imported and not declared"


def _canonical(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", BOUNDED)
def test_what_changes_under_us_has_an_upper_bound_that_admits_what_is_tested(name: str) -> None:
    specifier = REQUIRED[name].specifier
    assert any(one.operator == "<" for one in specifier)
    assert specifier.contains(version(name).split("+")[0])
    assert not specifier.contains("99.0")


def test_torch_2_11_to_2_15_are_supported() -> None:
    specifier = REQUIRED["torch"].specifier
    assert all(specifier.contains(f"2.{minor}.1") for minor in range(11, 16))
    assert not specifier.contains("2.16.0")
    assert not specifier.contains("2.10.2")
