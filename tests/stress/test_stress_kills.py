"""Kills, full and read-only disks before every file operation of every stage; runs side by side; many predictions.

LPVIT_STRESS_STEP=5 tries every fifth point.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_cases import CASES, OPTIONS, Ground, disk_points, kill_points, tried
from faults import growth_of_predictions, run_together, tensors_of
from helpers import run_cli

STEP = int(os.environ.get("LPVIT_STRESS_STEP", "1"))
PART = f", every {STEP}th" if STEP > 1 else ""
Row = Callable[[str, int, int, str], None]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("what", ["kill", "disk"])
def test_faults_at_every_file_operation(tmp_path: Path, row: Row, what: str, name: str) -> None:
    ground = Ground(CASES[name], tmp_path)
    kills = what == "kill"
    points = (kill_points if kills else disk_points)(ground.operations)[::STEP]
    count, wrong = tried(points, ground.killed if kills else ground.refused)
    held = count - len({line.split(":")[0] for line in wrong})
    promise = "the same command goes on; every tensor is the same, nothing is left over"
    told = "kill" if kills else "disk full, file too large or read-only"
    row(
        f"{told}{PART}: {name}",
        count,
        held,
        promise if kills else "exit 3, an error of at most three lines; then as after a kill",
    )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "commands", [("calibrate",) * 4, ("calibrate", "prune", "finetune-lora-ga", "export")], ids=["same", "other"]
)
def test_runs_side_by_side(tmp_path: Path, row: Row, commands: tuple[str, ...]) -> None:
    held, rounds = 0, 5
    for number in range(rounds):
        folder = tmp_path / f"{number}"
        for before in ("calibrate", "prune"):
            assert run_cli(before, "digits_vit", "-o", folder / "run", *OPTIONS).code == 0
        outcomes = run_together(
            folder, [(name, "digits_vit", "-o", folder / "run", *OPTIONS, "--no-resume") for name in commands]
        )
        codes = [outcome.result.code for outcome in outcomes if outcome.result]
        refused = [outcome.result.err for outcome in outcomes if outcome.result and outcome.result.code]
        fair = all("another lpvit is working" in err or "nothing from" in err or "other settings" in err for err in refused)
        held += 0 in codes and len(codes) == len(commands) and fair and bool(tensors_of(folder / "run"))
    which = "the same stage" if len(set(commands)) == 1 else "different stages"
    row(f"{len(commands)} processes, {which}, one folder", rounds, held, "one works, the others are told; artefacts are whole")
    assert held == rounds


def test_predictions_do_not_grow(tmp_path: Path, row: Row) -> None:
    for command in ("calibrate", "prune"):
        assert run_cli(command, "digits_vit", "-o", tmp_path / "run", *OPTIONS).code == 0
    grown = growth_of_predictions(tmp_path / "run" / "pruned", 200)
    row(
        "200 predictions in one process",
        1,
        int(grown < 2**23),
        "less than 8 MiB more memory after the 200th than after the 50th",
    )
    assert grown < 2**23
