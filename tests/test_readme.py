"""What the README tells people to type works, and what it says is there is there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Demo, Result

from lpvit_cli.stages import STAGES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
RECIPE_COMMANDS = {"run", *(stage.command for stage in STAGES)}


def test_there_are_commands_to_try() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line: str, lpvit: Callable[..., Result], demo: Demo) -> None:
    """Commands on finished runs do their work on the demo; those that start one are planned only (others run them in full)."""
    Path("runs").mkdir()
    Path("runs/demo").symlink_to(demo.folder)
    shutil.copytree(ROOT / "examples", "examples")
    program, *arguments = shlex.split(line)
    assert program == "lpvit"
    if arguments[0] in RECIPE_COMMANDS:
        arguments.append("--dry-run")
    result = lpvit(*arguments)
    assert result.code == 0, result.err
    assert result.out


@pytest.mark.parametrize("target", re.findall(r"^    make (\w+)", README, re.MULTILINE))
def test_make_target(target: str) -> None:
    done = subprocess.run(["make", "-n", "-C", ROOT, target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_table_has_every_command(lpvit: Callable[..., Result]) -> None:
    told = set(re.findall(r"^\| `lpvit ([\w-]+)", README, re.MULTILINE))
    helped = set(re.findall(r"^│ ([\w-]+)", lpvit("--help").out.split("Commands")[1], re.MULTILINE))
    assert told == helped


@pytest.mark.parametrize("document", ["README.md", "kernels/README.md", "docs/LOG.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    for link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), link
