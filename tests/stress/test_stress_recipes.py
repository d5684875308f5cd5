"""10,000 mutated recipes and all hostile ones: each is a recipe or a UsageError, soon and in little memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import hostile_recipes
import pytest
from hostile import Tally

COUNT, AT_A_TIME, PROCESSES = 10_000, 500, 2
PROMISE = "a recipe, or an error of at most three lines, within 5 s and 1 GiB"


@pytest.mark.parametrize("what", ["hostile", "mutated"])
def test_recipes(tmp_path: Path, row: Callable[..., None], what: str) -> None:
    total = Tally()
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        jobs = []
        for number in range(COUNT // AT_A_TIME if what == "mutated" else len(hostile_recipes.KEYS)):
            (folder := tmp_path / str(number)).mkdir()
            if what == "mutated":
                seeds = range(number * AT_A_TIME, (number + 1) * AT_A_TIME)
                jobs.append(pool.submit(hostile_recipes.mutations, folder, seeds))
            else:
                jobs.append(pool.submit(hostile_recipes.hostile, folder, (hostile_recipes.KEYS[number],)))
        for job in jobs:
            total += job.result(timeout=1200)
    row(f"{what} recipes", total.tried, total.tried - sum(total.broken.values()), PROMISE)
    assert total.refused < total.tried, "not one was a recipe: the mutations say nothing"
    assert not total.broken, total.examples
