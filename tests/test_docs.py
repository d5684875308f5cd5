"""The documents say what is so: the recipe reference is made from the schema and describes every key; examples work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import make_docs
import numpy as np
import pytest
import torch
import yaml
from helpers import Demo, Result
from pydantic import BaseModel
from torch import nn

from lpvit_cli import load_model
from lpvit_cli.measure.energy.meters import open_meter
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.section import Section
from lpvit_cli.registry import BUDGETS, FORMATS, METERS, METHODS, Registry


def sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from sections(kind)


SECTIONS = {section.__name__: section for section in sections(Recipe)}


def test_the_recipe_reference_is_current() -> None:
    assert make_docs.PAGE.read_text() == make_docs.page(), "run: python scripts/make_docs.py"


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_is_described(name: str) -> None:
    """By a comment that stands with the field, or in the section's docstring."""
    section = SECTIONS[name]
    told = make_docs.field_comments(section)
    unsaid = [key for key in section.model_fields if not told.get(key) and f"`{key}`" not in (section.__doc__ or "")]
    assert not unsaid


def test_the_reference_has_every_key_and_choice() -> None:
    page = make_docs.page()
    keys = Recipe.model_validate({"name": "x", "model": {"name": "x"}, "data": {"dataset": "x"}}).leaves()
    missing = [key for key in (*keys, "finetune.augment.mixup") if f"| `{key}` |" not in page and key != "prune.budget"]
    assert not missing
    for registry in (METHODS, BUDGETS, FORMATS):
        assert all(f"| `{name}` |" in page for name in make_docs.own(registry))


def test_comments_of_a_field() -> None:
    class Example(Section):
        """Comments stand above, behind, or behind and go on below."""

        none: int = 0
        # above
        # two lines
        above: int = 0
        behind: int = 0  # behind
        goes_on: int = 0  # behind, and
        # below
        after: int = 0

    told = make_docs.field_comments(Example)
    assert told == {"none": "", "above": "above two lines", "behind": "behind", "goes_on": "behind, and below", "after": ""}


ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
KINDS: dict[str, tuple[Registry, str]] = {
    "random": (METHODS, "Random"),
    "megabytes": (BUDGETS, "Megabytes"),
    "npz": (FORMATS, "Npz"),
    "plug": (METERS, "Plug"),
}


@pytest.fixture
def added() -> Iterator[dict[str, Any]]:
    """The examples of CONTRIBUTING.md, each a module of its own, registered."""
    things = {}
    for (name, (registry, attribute)), source in zip(KINDS.items(), EXAMPLES, strict=True):
        module = ModuleType(f"elsewhere_{name}")
        sys.modules[module.__name__] = module
        exec(compile(source, f"{name}.py", "exec"), module.__dict__)
        things[name] = getattr(module, attribute)
        registry.register(name, things[name])
    yield things
    for name, (registry, _) in KINDS.items():
        registry.unregister(name)
        del sys.modules[f"elsewhere_{name}"]


def test_what_contributing_adds_works(
    added: dict[str, Any], lpvit: Callable[..., Result], demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(demo.folder, tmp_path / "run")
    run = ["digits_vit", "-o", "run", *demo.options]
    exported = lpvit("export", *run, "--format", "npz", "--json")
    assert exported.code == 0, exported.err
    with np.load("run/export/model.npz") as archive:
        assert set(archive) == set(load_model("run/finetuned").state_dict())
    pruned = lpvit("prune", *run, "--set", "prune.method=random", "--set", "prune.budget.megabytes=4", "--json")
    assert pruned.code == 0, pruned.err
    report = json.loads(pruned.out)
    assert report["method"] == "random"
    assert 3.8e6 < report["bytes"] < 4.05e6  # a file has a header, and where the blocks are
    monkeypatch.setenv("LPVIT_PLUG", str(tmp_path / "joules"))
    (tmp_path / "joules").write_text("1.5")
    meter, _ = open_meter("cpu")
    assert isinstance(meter, added["plug"])
    assert meter.read().energy_mj == 1500


def test_the_gate_example(lpvit: Callable[..., Result], demo: Demo) -> None:
    """Its accuracy step passes the demo, and fails it where more is asked for."""
    (job,) = yaml.safe_load((ROOT / "examples" / "gate.yml").read_text())["jobs"].values()
    script = next(step["run"] for step in job["steps"] if step.get("name") == "Accuracy")
    command, _, rest = script.partition("\n")
    *arguments, _, file = command.split()
    Path(file).write_text(lpvit(*[str(demo.folder) if word == "runs/new" else word for word in arguments[1:]]).out)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    codes = [
        subprocess.run(["bash", "-e", "-c", rest], env={"PATH": path, "LEAST_TOP1": least}, check=False).returncode
        for least in ("90", "100.1")
    ]
    assert codes == [0, 1]


def test_the_readme_in_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_vit: nn.Module) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    source = source.replace("block=(64, 32)", "block=(16, 16)").replace("epochs=3", "epochs=1, rank=4")
    exec(source, {"model": tiny_vit, "images": torch.randn(64, 3, 32, 32)})
    assert Path("model.onnx").is_file()
