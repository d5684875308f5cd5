"""What the README and the documents tell people to type works, and what they say is there is there."""

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
DOCUMENTS = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "kernels/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]
TEXTS = {document: (ROOT / document).read_text() for document in DOCUMENTS}
COMMANDS = list(
    dict.fromkeys(
        line
        for text in TEXTS.values()
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    )
)
RECIPE_COMMANDS = {"run", *(stage.command for stage in STAGES)}


def test_there_are_commands_to_try() -> None:
    assert len(COMMANDS) >= 6


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line: str, lpvit: Callable[..., Result], demo: Demo) -> None:
    """Commands on finished runs do their work on the demo; those that start one are planned only (others run them in full)."""
    shutil.copytree(demo.folder, "runs/demo")
    shutil.copytree(ROOT / "examples", "examples")
    program, *arguments = shlex.split(line)
    assert program == "lpvit"
    if arguments[0] in RECIPE_COMMANDS:
        arguments.append("--dry-run")
    result = lpvit(*arguments)
    assert result.code == 0, result.err
    assert result.out


@pytest.mark.parametrize(
    "target", sorted({name for text in TEXTS.values() for name in re.findall(r"^    make (\w+)", text, re.M)})
)
def test_make_target(target: str) -> None:
    done = subprocess.run(["make", "-n", "-C", ROOT, target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_table_has_every_command(lpvit: Callable[..., Result]) -> None:
    told = set(re.findall(r"^\| `lpvit ([\w-]+)", README, re.MULTILINE))
    helped = set(re.findall(r"^│ ([\w-]+)", lpvit("--help").out.split("Commands")[1], re.MULTILINE))
    assert told == helped


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[document]):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """Of the headings of a document, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
