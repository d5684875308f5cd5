"""Runs interpreted.py with TRITON_INTERPRET=1, which must be set before Triton is imported: hence a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", Path(__file__).with_name("interpreted.py"), "-p", "no:cacheprovider"]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
