"""calibrate, prune and finetune-lora-ga in two processes (gloo): what one process does, and no hang when one of them dies."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from helpers import FRESH, relative, run_cli
from safetensors.torch import load_file

from lpvit_cli import distributed
from lpvit_cli.cli.console import Console
from lpvit_cli.errors import UsageError

SMALL = [
    "dtype=float32",  # sums in bfloat16 depend on how images are cut into batches
    "calibrate.gradient=empirical",  # labels that are drawn depend on the process
    "model.weights=null",
    "model.kwargs={img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, num_classes: 10}",
    "data.dataset=synthetic",
    "data.val_split=train",  # the labels mean nothing: learning them is the only way to be better
    "data.batch_size=10",  # 64 images: the last batch has 4
    "data.workers=0",
    "calibrate.images=18",
    "calibrate.batch_size=5",  # the last batch has 3
    "prune.block=[16,16]",
    "prune.budget.sparsity=0.5",
    "finetune.epochs=2",
    "finetune.rank=4",
    "finetune.lr=0.01",
    "finetune.init_batches=2",
    "finetune.augment={flip: 0.5, erasing: 0.2}",
]
OPTIONS = [option for change in SMALL for option in ("--set", change)]
LPVIT = "from lpvit_cli.cli import app; app()"
DIES = f"""
import os
from lpvit_cli.recovery.trainer import Trainer
step = Trainer._step
def dying(self, batches):
    if os.environ["RANK"] == "1" and self.done == 9:
        os._exit(9)
    return step(self, batches)
Trainer._step = dying
{LPVIT}
"""
STOPS = DIES.replace("os._exit(9)", "os.kill(os.getpid(), signal.SIGSTOP)").replace("import os", "import os, signal")


KNOWS_NO_LABEL = f"""
import os
from lpvit_cli.data.readers import SyntheticReader
given = SyntheticReader.__getitem__
if os.environ["RANK"] == "1":
    SyntheticReader.__getitem__ = lambda self, index: (given(self, index)[0], 10)
{LPVIT}
"""


STATISTICS_AGREE = f"""
from lpvit_cli import distributed
from lpvit_cli.tasks.evaluation import Validation
given = Validation.quality
def quality(self, model, what, neighbours=True):
    told = [repr([b.double().sum().item() for n, b in model.named_buffers() if "running" in n])]
    assert told[0] != "[]", "a model without statistics"
    assert len(set(distributed.all_gather(told))) == 1, "processes validate different models"
    return given(self, model, what, neighbours)
Validation.quality = quality
{LPVIT}
"""
MAXVIT = [  # with BatchNorm
    "model.name=maxvit_rmlp_pico_rw_256",
    "model.kwargs={img_size: 64, embed_dim: [32, 64], depths: [1, 1], block_type: [M, M], stem_width: 8, num_classes: 10}",
    "prune.layers.include=['*.mlp.fc1', '*.mlp.fc2']",
    "prune.layers.exclude=['*.rel_pos.*']",
    "prune.sequential=false",
    "finetune.epochs=1",
    "finetune.ema=0.9",
]


def run_script(script: str, arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """As `python -c SCRIPT ARGUMENTS` in a process of its own."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = ["-c", *arguments]
    exec(script, {"__name__": "__main__"})


def together(
    *arguments: object, script: str = LPVIT, stopped: int | None = None, **environment: str
) -> list[tuple[int | None, str, str]]:
    """Exit code, stdout and stderr of the same command in two processes, as torchrun sets them up.

    `stopped`: the process that will not end by itself.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), **environment}
        free.close()
        files = [(Path(folder) / f"out{rank}", Path(folder) / f"err{rank}") for rank in "01"]
        processes = [
            FRESH.Process(
                target=run_script, args=(script, [*map(str, arguments)], {**job, "RANK": rank, "LOCAL_RANK": rank}, *to)
            )
            for rank, to in zip("01", files, strict=True)
        ]
        for process in processes:
            process.start()
        for process in sorted(processes, key=lambda process: process is processes[stopped or 0] and stopped is not None):
            process.join(0 if stopped is not None and process is processes[stopped] else 120)
            process.kill()
            process.join()
        return [
            (process.exitcode, out.read_text(), err.read_text()) for process, (out, err) in zip(processes, files, strict=True)
        ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated, pruned and recovered in one process."""
    folder = tmp_path_factory.mktemp("processes") / "run"
    for command in ("calibrate", "prune", "finetune-lora-ga"):
        result = run_cli(command, "digits_vit", "-o", folder, *OPTIONS)
        assert result.code == 0, result.err
    return folder


@pytest.fixture
def pruned(alone: Path, tmp_path: Path) -> Path:
    for name in ("calibration", "pruned"):
        shutil.copytree(alone / name, tmp_path / "run" / name)
    shutil.copy(alone / "recipe.yaml", tmp_path / "run")
    return tmp_path / "run"


def test_calibration_gives_the_same_statistics_and_masks(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    main, other = together("calibrate", "digits_vit", "-o", folder, *OPTIONS)
    assert (main[0], other[0]) == (0, 0), main[2] + other[2]
    assert "18 images" in main[1]
    assert other[1:] == ("", ""), "only the main process prints"
    ours, theirs = (load_file(run / "calibration" / "statistics.safetensors") for run in (folder, alone))
    assert ours.keys() == theirs.keys()
    for name, statistic in theirs.items():
        assert relative(ours[name], statistic) < 1e-5
    assert run_cli("prune", "digits_vit", "-o", folder, *OPTIONS).code == 0
    masks = [[layer["kept_map"] for layer in report(run, "pruned")["layers"]] for run in (folder, alone)]
    assert masks[0] == masks[1]


def test_pruning_gives_the_same_masks_and_weights(alone: Path, tmp_path: Path) -> None:
    """Each process has a share of the images: 9 and 8 in one batch, and one in a batch that the other does not have."""
    folder = tmp_path / "run"
    shutil.copytree(alone / "calibration", folder / "calibration")
    shutil.copy(alone / "recipe.yaml", folder)
    main, other = together("prune", "digits_vit", "-o", folder, *OPTIONS, "--set", "calibrate.batch_size=17")
    assert (main[0], other[0]) == (0, 0), main[2] + other[2]
    assert other[1:] == ("", ""), "only the main process prints"
    ours, theirs = (report(run, "pruned") for run in (folder, alone))
    assert [layer["kept_map"] for layer in ours["layers"]] == [layer["kept_map"] for layer in theirs["layers"]]
    assert ours["quality"]["images"] == theirs["quality"]["images"]
    weighed = [[note for note in one["notes"] if "weighed by" in note] for one in (ours, theirs)]
    assert weighed[0] == weighed[1] != []
    got, expected = (load_file(run / "pruned" / "model.safetensors") for run in (folder, alone))
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4)


def report(run: Path, stage: str) -> dict:  # type: ignore[type-arg]
    content: dict = json.loads((run / stage / "report.json").read_text())  # type: ignore[type-arg]
    return content


def losses(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "finetuned" / "history.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "step" in entry]


def same_recovery(run: Path, expected: Path) -> None:
    """To the rounding of sums taken in another order, which the optimizer enlarges."""
    assert report(expected, "finetuned")["best_epoch"] > 0, "what was trained must be what is compared"
    assert losses(run) == pytest.approx(losses(expected), rel=1e-3)
    ours, theirs = (load_file(folder / "finetuned" / "model.safetensors") for folder in (run, expected))
    for name, tensor in theirs.items():
        if tensor.is_floating_point() and tensor.any():
            assert relative(ours[name], tensor) < 1e-2, name
        else:
            assert torch.equal(ours[name], tensor), name


def test_recovery_under_torchrun_takes_the_same_steps(alone: Path, pruned: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lpvit_cli"]
    command = [*torchrun, "finetune-lora-ga", "digits_vit", "-o", str(pruned), *OPTIONS, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2, "one document, not two"
    assert [name for name in os.listdir(pruned) if name.startswith(".finetuned")] == []
    same_recovery(pruned, alone)


def test_statistics_of_batch_norm_are_the_same_in_all_processes(tmp_path: Path) -> None:
    options = [*OPTIONS, *(option for change in MAXVIT for option in ("--set", change))]
    for command in ("calibrate", "prune"):
        assert run_cli(command, "digits_vit", "-o", tmp_path / "run", *options).code == 0
    for code, _, err in together("finetune-lora-ga", "digits_vit", "-o", tmp_path / "run", *options, script=STATISTICS_AGREE):
        assert code == 0, err


def test_a_process_that_dies_ends_the_job_and_one_process_goes_on(alone: Path, pruned: Path) -> None:
    main, other = together("finetune-lora-ga", "digits_vit", "-o", pruned, *OPTIONS, script=DIES)
    assert other[0] == 9
    assert main[0] == 3, main[2]
    assert re.search(r"error: process 0 of 2: process 1 \(pid \d+ on .+\) has ended\n  see its own message; ", main[2])
    assert "Traceback" not in main[2]
    assert not (pruned / "finetuned").exists()
    result = run_cli("finetune-lora-ga", "digits_vit", "-o", pruned, *OPTIONS)
    assert result.code == 0, result.err
    assert "resumed after step 7" in result.out
    same_recovery(pruned, alone)


def test_an_error_that_one_process_alone_meets_is_told_by_it(tmp_path: Path) -> None:
    main, other = together("calibrate", "digits_vit", "-o", tmp_path / "run", *OPTIONS, script=KNOWS_NO_LABEL)
    assert (main[0], other[0]) == (3, 2)
    assert "an image has label 10, but the model has classes 0 to 9" in other[2]
    assert "process 0 of 2: process 1 (pid " in main[2]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_stopped_ends_the_job(alone: Path, pruned: Path, rank: int) -> None:
    script = STOPS.replace('"1"', f'"{rank}"')
    results = together(
        "finetune-lora-ga", "digits_vit", "-o", pruned, *OPTIONS, script=script, stopped=rank, LPVIT_PATIENCE="3"
    )
    code, _, err = results[1 - rank]
    assert code == 3, err
    assert re.search(rf"error: process {1 - rank} of 2: process {rank} \(pid \d+ on .+\) has not answered for 3 s", err)
    assert "LPVIT_PATIENCE=SECONDS" in err
    assert not (pruned / "finetuned").exists()


class Stopped:
    """A store whose keeper is stopped, or has ended when `gone`."""

    def __init__(self, gone: bool):
        self.gone = gone

    def clone(self) -> Stopped:
        return self

    def set(self, *_: str) -> None:
        pass

    def get(self, _: str) -> bytes:
        if self.gone:
            raise RuntimeError("Broken pipe")
        threading.Event().wait(60)
        return b"0 1 host"


@pytest.mark.parametrize("agent", ["True", "False"])
def test_who_keeps_the_job_together_is_named(monkeypatch: pytest.MonkeyPatch, agent: str) -> None:
    named = "torchrun, which keeps the job together," if agent == "True" else "process 0"
    environment = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": agent}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told: queue.Queue[distributed.PeerLost] = queue.Queue()
    distributed.Watch(Stopped(gone=False), 0.2, told.put).start()
    lost = told.get(timeout=60)
    assert lost.message.startswith(f"process 1 of 3: {named} has not answered for 0.2 s")
    assert distributed.speaks(lost) == (agent == "False")
    watch = distributed.Watch(Stopped(gone=True), 0.2, told.put)
    assert distributed._lost(watch).message == f"process 1 of 3: {named} has ended"
    monkeypatch.setenv("RANK", "2")
    assert distributed.speaks(lost) == (agent == "True"), "the last one: the first may be on the machine that is lost"
    monkeypatch.setenv("RANK", "0")
    found = watch.who_ended()
    assert str(found) == named if agent == "True" else found is None


def test_a_command_that_failed_in_a_job_listens_again() -> None:
    def fails_as_a_job() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise UsageError("wrong")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), Console().command():
        fails_as_a_job()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("seconds", ["soon", "0", "-1", "inf", "nan"])
def test_patience_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    monkeypatch.setenv("LPVIT_PATIENCE", seconds)
    with pytest.raises(UsageError, match="not a number of seconds"):
        distributed.patience()
    monkeypatch.delenv("LPVIT_PATIENCE")
    assert (distributed.patience(), distributed.patience(120)) == (60, 120)


def test_a_batch_smaller_than_the_job_leaves_some_without_images(alone: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, "--set", "calibrate.batch_size=1"]
    main, other = together("calibrate", "digits_vit", "-o", tmp_path / "run", *options)
    assert (main[0], other[0]) == (0, 0), main[2] + other[2]
    ours, theirs = (load_file(run / "calibration" / "statistics.safetensors") for run in (tmp_path / "run", alone))
    for name, statistic in theirs.items():
        assert relative(ours[name], statistic) < 1e-5


@pytest.mark.parametrize("command", ["bench", "export", "run"])
def test_other_commands_are_for_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    result = run_cli(command, "digits_vit", "-o", tmp_path / "run", *OPTIONS)
    assert result.code == 2
    assert "runs in one process, not under torchrun" in result.err
    assert not (tmp_path / "run").exists()
