"""10,000 mutated files of every kind: each is read or refused in at most three lines, soon and in little memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import hostile_files
import pytest
from hostile import Tally

COUNT, AT_A_TIME, PROCESSES = int(os.environ.get("STRESS_FILES", "10000")), 50, 2
PROMISE = "read, or an error of at most three lines, within 5 s and 1 GiB"


@pytest.mark.parametrize("kind", hostile_files.KINDS)
def test_files(tmp_path: Path, row: Callable[..., None], kind: str) -> None:
    share = -(-COUNT // len(hostile_files.KINDS))
    total = Tally()
    with ProcessPoolExecutor(PROCESSES, get_context("spawn"), hostile_files.limit_memory) as pool:
        jobs = [
            pool.submit(hostile_files.try_kind, kind, tmp_path / str(first), range(first, min(first + AT_A_TIME, share)))
            for first in range(0, share, AT_A_TIME)
        ]
        for job in jobs:
            total += job.result(timeout=1800)
    row(f"mutated {kind}", total.tried, total.tried - sum(total.broken.values()), PROMISE)
    assert total.refused or kind == "history.jsonl", "not one was refused: the mutations say nothing"  # that one is cut
    assert not total.broken, total.examples
