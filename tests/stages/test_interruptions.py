"""Interrupts and full disks in every stage: the exit code, nothing half-made, and going on afterwards."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_cli
from lpvit_kernels import dispatch, tuned
from lpvit_kernels.tuned import Choice, Tuned

from lpvit_cli.cli.console import Console
from lpvit_cli.stages import STAGES

SMALL = [
    "model.weights=null",
    "model.kwargs={img_size: 32, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2, num_classes: 10}",
    "data.dataset=synthetic",
    "data.batch_size=8",
    "calibrate.images=16",
    "calibrate.batch_size=8",
    "prune.block=[16,16]",
    "finetune.epochs=3",
    "finetune.rank=16",
    "bench.batch_sizes=[1]",
    "bench.rounds=6",
    "bench.warmup_seconds=0",
    "bench.energy.window_seconds=0.5",
]
OPTIONS = [option for change in SMALL for option in ("--set", change)]
MOMENTS = {  # a moment in the midst of each stage
    "calibrate": "calibrating",
    "prune": "evaluating the pruned model",
    "finetune-lora-ga": "recovering",
    "bench": "timing batch 1",
    "export": "evaluating the exported file",
}


def left_over(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in (".lock", "recipe.yaml"))


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.command)
def test_interrupt_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage) -> None:  # type: ignore[no-untyped-def]
    def interrupt(self: Console, what: str, done: int, total: int, detail: str) -> None:
        second_epoch = what != "recovering" or detail.startswith("epoch 2/")
        if what == MOMENTS[stage.command] and second_epoch:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Console, "progress", interrupt)
        result = run_cli("run", "digits_vit", "-o", folder, *OPTIONS, "--json")
    assert result.code == 130
    assert json.loads(result.out)["error"]["kind"] == "Interrupted"
    assert "run the same command again" in result.err
    earlier = [s.folder for s in STAGES[: STAGES.index(stage)]]
    progress = [name for name in left_over(folder) if name.endswith(".progress")]
    assert left_over(folder) == sorted(earlier + progress)
    assert bool(progress) is (stage.command == "finetune-lora-ga")

    result = run_cli(stage.command, "digits_vit", "-o", folder, *OPTIONS)
    assert result.code == 0, result.err
    assert left_over(folder) == sorted([*earlier, stage.folder])
    assert ("resumed after step 8" in result.out) is (stage.command == "finetune-lora-ga")


@pytest.mark.parametrize("optimizer", ["adamw", "mfac"])
def test_resumed_recovery_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Bit for bit: with M-FAC the window of gradients (4 here, 8 steps an epoch) is restored too. Tuning in between, which
    another backend wins that rounds otherwise, does not count until the next recovery."""

    def interrupt(self: Console, what: str, done: int, total: int, detail: str) -> None:
        if what == "recovering" and detail.startswith("epoch 3/"):
            raise KeyboardInterrupt

    # the labels mean nothing: learning those of the training images is the only way to be better
    changes = [f"finetune.optimizer={optimizer}", "finetune.mfac.window=4", "data.val_split=train", "finetune.lr=0.003"]
    options = [*OPTIONS, *(option for change in changes for option in ("--set", change))]
    once, twice = tmp_path / "once", tmp_path / "twice"
    monkeypatch.setenv("LPVIT_CACHE", str(tmp_path / "cache"))
    tuned.forget()
    cases: list[dispatch.Case] = []
    rule = dispatch.by_rule
    monkeypatch.setattr(dispatch, "by_rule", lambda case, **options: cases.append(case) or rule(case, **options))
    for folder in (once, twice):
        for command in ("calibrate", "prune"):
            assert run_cli(command, "digits_vit", "-o", folder, *options).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Console, "progress", interrupt)
        assert run_cli("finetune-lora-ga", "digits_vit", "-o", twice, *options).code == 130
    assert run_cli("finetune-lora-ga", "digits_vit", "-o", once, *options).code == 0
    tuned.record({case.key: Tuned(Choice("strided"), {"strided": 1.0}) for case in cases})
    for folder in (once, twice):
        assert run_cli("finetune-lora-ga", "digits_vit", "-o", folder, *options).code == 0
    a, b = (json.loads((folder / "finetuned" / "report.json").read_text()) for folder in (once, twice))
    assert [epoch["loss"] for epoch in a["history"]] == [epoch["loss"] for epoch in b["history"]]
    assert a["best_epoch"] > 0, "what was trained must be what is compared"
    assert b["notes"] == ["resumed after step 16"]
    weights = [(folder / "finetuned" / "model.safetensors").read_bytes() for folder in (once, twice)]
    assert weights[0] == weights[1]
    tuned.forget()


def lpvit_process(*arguments: object, file_limit: int | None = None) -> subprocess.Popen[str]:
    def limit() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that runs these tests in the background has it ignored
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    command = [sys.executable, "-m", "lpvit_cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit)


def test_ctrl_c_in_a_process_of_its_own(tmp_path: Path) -> None:
    process = lpvit_process("run", "digits_vit", "-o", tmp_path / "run", *OPTIONS, "--set", "finetune.epochs=2000")
    assert process.stderr is not None
    for line in process.stderr:
        if "recovering" in line:
            os.kill(process.pid, signal.SIGINT)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert (tmp_path / "run" / "pruned" / "report.json").is_file()
    assert not (tmp_path / "run" / "finetuned").exists()


@pytest.mark.parametrize(("limit", "stage"), [(2_000, "calibration"), (95_000, "finetuned")])
def test_a_disk_that_takes_no_more_bytes(tmp_path: Path, limit: int, stage: str) -> None:
    """95 kB hold the statistics of the attention and the pruned model, not the state of its training."""
    attention = ("--set", 'prune.layers.exclude=["*.mlp.*"]')
    process = lpvit_process("run", "digits_vit", "-o", tmp_path / "run", *OPTIONS, *attention, file_limit=limit)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert f"{stage}: cannot write" in err
    assert "Traceback" not in err
    assert stage not in left_over(tmp_path / "run")
    assert not [name for name in left_over(tmp_path / "run") if name.endswith(".partial")]
