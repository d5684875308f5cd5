"""The commands that are disturbed (faults.py): a small recipe, what is there before each, and what must hold after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from faults import Fault, Outcome, fresh_copy, left_in, run_with, tensors_of
from helpers import FRESH

FRESH.set_forkserver_preload(["warm", "warm_stages"])

SMALL = {
    "model.weights": "null",
    "model.kwargs": "{img_size: 32, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2, num_classes: 10}",
    "data.dataset": "synthetic",
    "data.batch_size": "32",
    "data.val_split": "train",  # labels mean nothing: to know those of the training images by heart is to be better
    "calibrate.images": "16",
    "calibrate.batch_size": "8",
    "prune.block": "[16,16]",
    "prune.reweigh": "0",
    "prune.layers.exclude": '["*.mlp.*"]',
    "finetune.epochs": "2",
    "finetune.lr": "0.003",
    "finetune.rank": "8",
    "bench.batch_sizes": "[1]",
    "bench.rounds": "6",
    "bench.warmup_seconds": "0",
    "bench.energy.window_seconds": "0.1",
    "profile.rounds": "6",
    "export.form": "rows",
}
OPTIONS = [option for key, value in SMALL.items() for option in ("--set", f"{key}={value}")]
STEPS = [option for budget in ("schedule=[0.3,0.5]", "finetune.epochs=1") for option in ("--set", budget)]


@dataclass(frozen=True)
class Case:
    """A command with its options; `before`: the commands that have run; `again`: what a user gives who repeats it."""

    command: str
    before: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    again: tuple[str, ...] | None = None

    def arguments(self, root: Path, again: bool = False) -> list[object]:
        options = self.options if self.again is None or not again else self.again
        return [self.command, "digits_vit", "-o", root / "run", *OPTIONS, *options]


CASES = {
    "calibrate": Case("calibrate"),
    "calibrate, taking a folder over": Case("calibrate", ("prune other",), ("--overwrite",)),
    "prune": Case("prune", ("calibrate",)),
    "prune --no-resume, over an artefact": Case("prune", ("calibrate", "prune"), ("--no-resume",), again=()),
    "finetune-lora-ga": Case("finetune-lora-ga", ("calibrate", "prune")),
    "gradual": Case("gradual", (), tuple(STEPS)),
    "prune --sweep": Case("prune", ("calibrate",), ("--sweep", "0.3,0.5")),
    "export": Case("export", ("calibrate", "prune"), ("--format", "onnx", "--format", "torch")),
    "profile": Case("profile"),
    "bench": Case("bench", ("calibrate", "prune")),
}


class Ground:
    """Where one case is tried over and over: always in the same folder, so that what is made can be compared bit for bit."""

    def __init__(self, case: Case, folder: Path):
        self.case, self.root, self.base = case, folder / "root", folder / "base"
        fresh_copy(None, self.root)
        for command in case.before:
            name, *other = command.split()
            more = ["--set", "name=other"] if other else []
            if other:
                self._must(run_with(None, self.root, "calibrate", "digits_vit", "-o", self.root / "run", *OPTIONS, *more))
            self._must(run_with(None, self.root, name, "digits_vit", "-o", self.root / "run", *OPTIONS, *more))
        fresh_copy(self.root, self.base)
        undisturbed = self._must(run_with(None, self.root, *case.arguments(self.root)))
        self.operations = undisturbed.operations
        self.tensors, self.left = tensors_of(self.root / "run"), left_in(self.root)

    @staticmethod
    def _must(outcome: Outcome) -> Outcome:
        assert outcome.result is not None
        assert outcome.result.code == 0, outcome.result.err
        return outcome

    def disturbed(self, fault: Fault) -> Outcome:
        fresh_copy(self.base, self.root)
        return run_with(fault, self.root, *self.case.arguments(self.root))

    def repeated(self) -> list[str]:
        """The same command once more; what is wrong with what it leaves."""
        wrong = []
        outcome = run_with(None, self.root, *self.case.arguments(self.root, again=True))
        if outcome.result is None or outcome.result.code:
            return [f"refused: {outcome.result and outcome.result.err[-300:]}"]
        tensors, left = tensors_of(self.root / "run"), left_in(self.root)
        if tensors.keys() != self.tensors.keys():
            wrong.append(f"other tensors: {sorted(tensors.keys() ^ self.tensors.keys())}")
        if other := [name for name in tensors.keys() & self.tensors.keys() if tensors[name] != self.tensors[name]]:
            wrong.append(f"different: {other[:3]}")
        if over := left - self.left:
            wrong.append(f"left over: {sorted(over)[:5]}")
        if missing := {name for name in self.left - left if not name.startswith("tmp")}:
            wrong.append(f"missing: {sorted(missing)[:5]}")
        return wrong

    def killed(self, fault: Fault) -> list[str]:
        outcome = self.disturbed(fault)
        if outcome.result is not None:
            return [f"was not killed: {outcome.result.err[-300:]}"]
        return self.repeated()

    def refused(self, fault: Fault) -> list[str]:
        """A disk that fails: an error of one to three lines, exit 3, and no artefact that was not there."""
        outcome = self.disturbed(fault)
        assert outcome.result is not None
        code, lines = outcome.result.code, outcome.result.err.splitlines()
        wrong = []
        if code == 0:  # what could not be written was not needed: what is there must be whole
            return self.repeated()
        error = next((number for number, line in enumerate(lines) if line.startswith("error: ")), None)
        if code != 3 or error is None or len(lines) - error > 3 or "Traceback" in outcome.result.err:
            wrong.append(f"exit {code}: {outcome.result.err[-600:]}")
        return wrong + self.repeated()


def tried(points: Iterable[Fault], check: Callable[[Fault], list[str]]) -> tuple[int, list[str]]:
    """How many faults were tried, and what went wrong."""
    count, wrong = 0, []
    for fault in points:
        count += 1
        wrong += [f"{fault.kind} at {fault.at}: {what}" for what in check(fault)]
    return count, wrong


def kill_points(operations: list[str]) -> list[Fault]:
    """Before each operation, and in the midst of each file."""
    before = [Fault("kill", at) for at in range(1, len(operations) + 1)]
    torn = [Fault("torn", at) for at, operation in enumerate(operations, start=1) if operation.startswith("open ")]
    return before + torn


def disk_points(operations: list[str]) -> list[Fault]:
    return [Fault(kind, at) for kind in ("full", "no bytes", "read-only") for at in range(1, len(operations) + 1)]
