"""Faults at the n-th file operation of a command: kills, and disks that are full or cannot be written.

A command runs in a process of its own, where an audit hook counts whatever changes files below one folder: opening for writing,
making, renaming and removing. What libraries write without Python's knowledge is not counted, but a full disk meets it too.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from helpers import FRESH, Result, run_cli
from safetensors.torch import load_file

CREATING = ("open", "os.mkdir", "os.link", "os.symlink")
CHANGING = (*CREATING, "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FRESH_NAME = re.compile(r"-\d+-[0-9a-f]{8}\b")  # what makes temporary names differ
KINDS = (
    "kill",  # before the operation
    "torn",  # a kill when a file was opened and half a line written
    "full",  # from this operation on nothing new can be made
    "no bytes",  # from this operation on no file can grow
    "read-only",  # from this operation on nothing can be changed
)


@dataclass(frozen=True)
class Fault:
    kind: str
    at: int  # the operation, from 1 on


@dataclass(frozen=True)
class Outcome:
    """What became of a command; no result: it was killed. `operations`: what it changed, in order."""

    result: Result | None
    operations: list[str]


def run_with(fault: Fault | None, root: Path, *arguments: object) -> Outcome:
    """`lpvit ARGUMENTS` in a fresh process, with the cache and temporary files below `root` too."""
    ours, theirs = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=_child, args=(theirs, fault, root, [str(a) for a in arguments]))
    process.start()
    theirs.close()
    try:
        outcome: Outcome = ours.recv()
    except EOFError:
        outcome = Outcome(None, [])
    process.join(120)
    assert outcome.result or process.exitcode == -signal.SIGKILL, f"ended with {process.exitcode}"
    return outcome


def _child(pipe: Connection, fault: Fault | None, root: Path, arguments: list[str]) -> None:
    for name, folder in (("LPVIT_CACHE", root / "cache"), ("TMPDIR", root / "tmp")):
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(folder)
    os.environ["COLUMNS"] = "200"
    tempfile.tempdir, sys.dont_write_bytecode = None, True
    torch.set_num_threads(1)
    counter = Counter(fault, root)
    sys.addaudithook(counter)
    result = run_cli(*arguments)
    counter.fault = None
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    pipe.send(Outcome(result, counter.operations))


class Counter:
    """An audit hook."""

    def __init__(self, fault: Fault | None, root: Path):
        self.fault, self.root, self.operations, self.busy = fault, str(root.resolve()), [], False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGING or self.busy:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        self.busy = True
        try:
            path = _path(event, arguments)
            if path.startswith(self.root):
                self.operations.append(f"{event} {FRESH_NAME.sub('', path.removeprefix(self.root))}")
                if self.fault and len(self.operations) >= self.fault.at:
                    self.strike(self.fault.kind, event, path, arguments)
        finally:
            self.busy = False

    def strike(self, kind: str, event: str, path: str, arguments: tuple[Any, ...]) -> None:
        if kind == "torn" and event == "open":
            os.write(os.open(path, arguments[2], 0o666), b'{"half')
        if kind in ("kill", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "no bytes":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if kind == "full" and event in CREATING and not (event == "open" and os.path.exists(path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if kind == "read-only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)


def _path(event: str, arguments: tuple[Any, ...]) -> str:
    """The absolute path that is changed; what is named below an open folder (as rmtree does) is resolved."""
    if not isinstance(arguments[0], str | bytes | os.PathLike):
        return ""
    path = os.fsdecode(arguments[0])
    below = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2}.get(event)
    if below and not os.path.isabs(path) and isinstance(arguments[below], int) and arguments[below] >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[below]}"), path)
    return os.path.abspath(path)


# what is there afterwards


def tensors_of(folder: Path) -> dict[str, bytes]:
    """All tensors below a folder, by file and name, bit for bit."""
    return {
        f"{file.relative_to(folder)} {name}": tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if tensor.numel()
    }


def left_in(root: Path) -> set[str]:
    """What a run folder, the cache and the folder for temporary files hold; of artefacts everything."""
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def fresh_copy(base: Path | None, root: Path) -> None:
    """`root` as it was before the command."""
    shutil.rmtree(root, ignore_errors=True)
    if base is None:
        root.mkdir(parents=True)
    else:
        shutil.copytree(base, root, symlinks=True)


# several processes, and one for long


def run_together(root: Path, commands: list[tuple[object, ...]]) -> list[Outcome]:
    """Commands at the same time, each in a process of its own."""
    pipes, processes = [], []
    for command in commands:
        ours, theirs = FRESH.Pipe(duplex=False)
        process = FRESH.Process(target=_child, args=(theirs, None, root, [str(a) for a in command]))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    outcomes = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join(120)
    return outcomes


def growth_of_predictions(model: Path, times: int) -> int:
    """How many bytes more a process holds after that many predictions than after a quarter of them."""
    ours, theirs = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=_predict, args=(theirs, model, times))
    process.start()
    theirs.close()
    grown: int = ours.recv()
    process.join(120)
    return grown


def _predict(pipe: Connection, model: Path, times: int) -> None:
    torch.set_num_threads(1)
    image = Path(__file__).parent.parent / "examples" / "digit_3.png"
    held = {}
    for number in range(1, times + 1):
        assert run_cli("predict", model, image).code == 0
        held[number] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    pipe.send(held[times] - held[times // 4])
