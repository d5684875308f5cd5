"""scripts/gpu_check.sh, as far as it goes without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"


@pytest.mark.parametrize(("given", "used"), [(None, ".venv/bin/python"), ("own/python", "own/python")])
def test_the_interpreter_that_the_user_names_wins(tmp_path: Path, given: str | None, used: str) -> None:
    for python in (".venv/bin/python", "own/python"):
        (tmp_path / python).parent.mkdir(parents=True)
        (tmp_path / python).write_text('#!/bin/sh\necho "$0"\nexit 1\n')  # says that there is no GPU
        (tmp_path / python).chmod(0o755)
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"} | ({"PYTHON": given} if given else {})
    run = subprocess.run(["bash", tmp_path / "scripts" / SCRIPT.name], env=environment, capture_output=True, text=True)
    assert run.returncode == 3
    assert run.stdout.strip() == used
