"""A run folder: what has been made from a recipe, whether it still holds, and how a new artefact gets in.

A stage writes into a temporary sibling that is renamed when it is complete, so a kill never leaves half an artefact.
`stage.json` beside each artefact lists everything its content depends on; a stage is skipped while that list is unchanged.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lpvit_cli import __version__, distributed
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.measure.machine import installed
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe_source import is_profile_name
from lpvit_cli.stages import ALL_STAGES, BENCH, CALIBRATE, EXPORT, FINETUNE, GRADUAL, PROFILE, PRUNE, SWEEP, Stage

INPUTS = "inputs.json"  # in a progress folder: what it depends on

Progress = Callable[[str, int, int, str], None]  # what is being done, steps done, steps in all, detail


class Run:
    """RUN/, bound to the recipe at hand."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe = recipe
        self.folder = folder

    @contextmanager
    def open(self, overwrite: bool = False) -> Iterator[None]:
        """Claim the folder for this recipe and process; refuse one that belongs to something else.

        Of several processes the main one claims it, and only that one writes.
        """
        if not distributed.is_main():
            distributed.from_main(None)
            yield
            return
        foreign = self._foreign()
        if foreign and not overwrite:
            raise UsageError(f"{self.folder}: {foreign}", "choose another --output, or pass --overwrite to take it over")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentFault(f"{self.folder}: cannot create: {error.strerror}", "choose another --output") from error
        with writing(self.folder), (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise EnvironmentFault(
                    f"{self.folder}: another lpvit is working in this folder", "wait for it, or choose another --output"
                ) from error
            self._tidy(take_over=bool(foreign))
            replace_text(self.folder / "recipe.yaml", self.recipe.to_yaml())
            distributed.from_main(None)
            yield

    def _foreign(self) -> str:
        """What the folder holds that is not this recipe's run; empty when it is free or ours."""
        made_by = self.folder / "recipe.yaml"
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder}: is a file, a run needs a folder", "choose another --output")
        if not self.folder.is_dir() or not any(p.name != ".lock" for p in self.folder.iterdir()):
            return ""
        name = re.search(r"^name: (.*)$", made_by.read_text(), re.MULTILINE) if made_by.is_file() else None
        if name is None:
            return "is not empty and not a run folder"
        return (
            "" if name[1].strip("'\"") == self.recipe.name else f"holds a run of recipe {name[1]!r}, not {self.recipe.name!r}"
        )

    def _tidy(self, take_over: bool) -> None:
        """With the lock held: finish an interrupted publication, and remove what a run taken over has made."""
        for stage in ALL_STAGES:
            artefact, old = self.folder / stage.folder, self.folder / f".{stage.folder}.old"
            if old.is_dir() and not artefact.exists():
                old.rename(artefact)
            if artefact.exists() and not (artefact / "stage.json").is_file():
                raise UsageError(f"{artefact}: is in the way and not made by lpvit", "move it, or choose another --output")
        for stage in ALL_STAGES if take_over else ():
            shutil.rmtree(self.folder / stage.folder, ignore_errors=True)
            self._clear(f".{stage.folder}.*")

    # what an artefact depends on

    def upstream(self, stage: Stage) -> Stage | None:
        """The stage whose artefact this one reads. Bench and export take the recovered model when there is one."""
        if stage in (CALIBRATE, PROFILE, GRADUAL):
            return None
        if stage in (PRUNE, SWEEP):
            return CALIBRATE
        if stage is FINETUNE:
            return PRUNE
        if self.recipe.schedule:
            return GRADUAL
        recovered = self.recipe.finetune is not None and (self.folder / FINETUNE.folder / "stage.json").is_file()
        return FINETUNE if recovered else PRUNE

    def sources(self, stage: Stage) -> list[Stage]:
        """The stages of this run whose artefacts this one reads."""
        before = self.upstream(stage)
        measured = [PROFILE] if stage in (PRUNE, SWEEP, GRADUAL) and self._needs_own_profile else []
        return [*([before] if before else []), *measured]

    def inputs(self, stage: Stage) -> dict[str, Any]:
        """Everything the artefact's content depends on, as flat keys and JSON values."""
        inputs = {key: value for key, value in self.recipe.flat().items() if stage.reads(key)}
        inputs |= {"versions.lpvit": __version__, "versions.torch": version("torch"), "versions.timm": version("timm")}
        before = self.upstream(stage)
        if before:
            record = self.record(before)
            inputs[before.folder] = record["fingerprint"] if record else None
        if stage in (PRUNE, SWEEP, GRADUAL) and (path := self.profile_path()):
            inputs["prune.profile (content)"] = content_id(path)
        if stage in (CALIBRATE, GRADUAL):
            inputs |= self._contents
        if stage in (FINETUNE, GRADUAL) and (finetune := self.recipe.finetune):
            if isinstance(finetune.rank, dict):
                inputs["finetune.rank (order)"] = list(finetune.rank)  # the first glob that matches counts
            if finetune.distill and finetune.distill.teacher and (weights := finetune.distill.teacher.weights):
                inputs["finetune.distill.teacher.weights (content)"] = content_id(weights)
        if stage is BENCH:
            inputs |= self._benched
        if stage is EXPORT:
            inputs["versions.onnxruntime"] = installed("onnxruntime")
        if stage is EXPORT and "hub" in self.recipe.export.formats and (bench := self.record(BENCH)):
            inputs["measured by bench"] = bench["fingerprint"]  # the model card tells its numbers
        if stage.timed:
            from lpvit_cli.models import describe_device, device_of

            inputs["measured on"] = describe_device(device_of(self.recipe))
        return inputs

    def profile_path(self) -> Path | None:
        """The device profile that pruning reads: the one the recipe names, or this run's where the budget needs one."""
        given = self.recipe.prune.profile
        if given is not None and is_profile_name(str(given)):
            from lpvit_cli.measure.profile import named_profile

            return named_profile(str(given))
        return self.folder / PROFILE.folder / "profile.json" if self._needs_own_profile else given

    @property
    def _needs_own_profile(self) -> bool:
        return self.recipe.prune.profile is None and self.recipe.prune.budget.needs_profile

    @property
    def _benched(self) -> dict[str, Any]:
        """What bench measures beside this run's model. Exports that tell its numbers depend on it in turn: not on that."""
        bench, exported = self.recipe.bench, self.record(EXPORT) if "onnx" in self.recipe.bench.subjects else None
        inputs: dict[str, Any] = {}
        if exported:
            inputs["export"] = digest({key: value for key, value in exported["inputs"].items() if key != "measured by bench"})
        if bench.baseline:
            files = [bench.baseline, *sorted(bench.baseline.glob("**/model.safetensors"))]
            inputs["bench.baseline (content)"] = digest([content_id(path) for path in files if path.is_file()])
        return inputs

    @cached_property
    def _contents(self) -> dict[str, Any]:
        paths = {"model.weights (content)": self.recipe.model.weights, "data.root (file names)": self.recipe.data.root}
        return {key: content_id(path) for key, path in paths.items() if path}

    def record(self, stage: Stage) -> dict[str, Any] | None:
        path = self.folder / stage.folder / "stage.json"
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise EnvironmentFault(f"{path}: unreadable: {error}", f"delete {path.parent} and run the stage again") from error
        return content

    def changes(self, stage: Stage) -> list[str] | None:
        """Why the artefact does not hold any more: [] it holds; None there is none."""
        record = self.record(stage)
        if record is None:
            return None
        for before in self.sources(stage):
            if earlier := self.changes(before):
                return [f"{before.folder}: {earlier[0]}"]
        old, new = record["inputs"], self.inputs(stage)
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        artefacts = {stage.folder for stage in ALL_STAGES}
        return [
            f"{key} was made again" if key in artefacts else f"{key}: {old.get(key, 'none')} -> {new.get(key, 'none')}"
            for key in changed
        ]

    def command(self, stage: Stage) -> str:
        """What makes a stage's artefact in this folder."""
        elsewhere = self.folder != Path("runs") / self.recipe.name
        return f"lpvit {stage.command} {self.recipe.name}" + f" --output {self.folder}" * elsewhere

    def artefact(self, stage: Stage) -> Path:
        """Folder of an artefact that holds, or a UsageError that says which command makes it."""
        changes = self.changes(stage)
        if changes is None:
            raise UsageError(f"{self.folder}: nothing from `{stage.command}` there yet", f"run: {self.command(stage)}")
        if changes:
            raise UsageError(
                f"{self.folder / stage.folder} was made with other settings ({changes[0]})",
                f"run `lpvit {stage.command}` again with the same recipe and --set options, or `lpvit run`",
            )
        return self.folder / stage.folder

    def model_artefact(self, stage: Stage) -> Path:
        """The model folder that bench and export take."""
        before = self.upstream(stage)
        assert before is not None
        return self.artefact(before)

    # making an artefact

    def progress_folder(self, stage: Stage) -> Path:
        """Where a long stage may keep restartable progress; it goes when the artefact is published or its inputs change."""
        folder = self._progress_path(stage)
        if distributed.is_main():
            folder.mkdir(exist_ok=True)
            replace_text(folder / INPUTS, json.dumps(self.inputs(stage), indent=1))
        return folder

    def _progress_path(self, stage: Stage) -> Path:
        return self.folder / f".{stage.folder}.progress-{digest(self.inputs(stage))}"

    def _require_same_settings(self, stage: Stage) -> None:
        """Progress of other settings would be lost: say which, unless what the stage reads was made again, which spoils it."""
        artefacts = {other.folder for other in ALL_STAGES}
        for folder in self.folder.glob(f".{stage.folder}.progress-*"):
            begun = any(path.suffix not in (".json", ".jsonl") for path in folder.iterdir())  # there is a state to go on from
            if folder == self._progress_path(stage) or not (folder / INPUTS).is_file() or not begun:
                continue
            old, new = json.loads((folder / INPUTS).read_text()), self.inputs(stage)
            changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
            if changed and not artefacts & set(changed):
                key = changed[0]
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                raise UsageError(
                    f"{self.folder}: an interrupted {stage.command} was begun with other settings: {key} was "
                    f"{old.get(key, 'none')}, is {new.get(key, 'none')}{more}",
                    "go on with the old settings, or start anew with --no-resume",
                )

    def execute(self, stage: Stage, progress: Progress, resume: bool = True) -> Any:
        """Run one stage and publish what it made; returns its report."""
        inputs = self.inputs(stage)  # first of all: a device that is not there is told before what is to be made for it
        for before in self.sources(stage):
            self.artefact(before)
        if not distributed.is_main():
            distributed.from_main(None)  # leftovers of other settings are gone
            with tempfile.TemporaryDirectory() as scratch:
                return stage.function(self.recipe, self, Path(scratch), progress)
        if resume:
            self._require_same_settings(stage)
        inputs = self.inputs(stage)
        kept = self._progress_path(stage) if resume else None
        self._clear(f".{stage.folder}.*", keep=kept)
        distributed.from_main(None)
        work = self.folder / f".{stage.folder}.partial"
        started = time.monotonic()
        with writing(self.folder / stage.folder):
            work.mkdir()
            try:
                report = stage.function(self.recipe, self, work, progress)
                replace_text(work / "report.json", report.model_dump_json(indent=1))
                record = {
                    "stage": stage.command,
                    "fingerprint": digest(inputs),
                    "inputs": inputs,
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                    "duration_s": round(time.monotonic() - started, 1),
                    "command": " ".join(sys.argv),
                    "git_commit": git_commit(),
                    "device": report.device,
                }
                replace_text(work / "stage.json", json.dumps(record, indent=1))
                publish(work, self.folder / stage.folder)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
        self._clear(f".{stage.folder}.*")
        return report

    def _clear(self, pattern: str, keep: Path | None = None) -> None:
        """Remove leftovers of this folder's earlier processes (the lock is ours)."""
        for leftover in self.folder.glob(pattern):
            if leftover != keep:
                shutil.rmtree(leftover, ignore_errors=True)

    def report(self, stage: Stage, schema: Any) -> Any:
        """The report of an artefact, as its pydantic class; an EnvironmentFault where another lpvit has written it."""
        path = self.folder / stage.folder / "report.json"
        try:
            return schema.model_validate_json(path.read_text())
        except (OSError, ValueError) as error:
            raise EnvironmentFault(
                f"{path}: not a report of this version of lpvit", f"make it again: {self.command(stage)} --no-resume"
            ) from error


def publish(work: Path, target: Path) -> None:
    """Put a complete folder in its place; the old one goes only when the new one stands."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_text(text)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


DISK_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error a user can act on."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else f"{path}: cannot write: {error.strerror}"
        raise EnvironmentFault(what, "check permissions and free space, or choose another --output") from error
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if not code or int(code[1]) not in DISK_ERRORS:
            raise
        raise EnvironmentFault(
            f"{path}: cannot write: {os.strerror(int(code[1]))}", "free space, or choose another --output"
        ) from error


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def content_id(path: Path) -> str | None:
    """A file's hash, or the hash of all file names below a folder (reading ImageNet itself would take an hour)."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if path.is_dir():
        return digest(
            sorted(os.path.relpath(os.path.join(top, name), path) for top, _, names in os.walk(path) for name in names)
        )
    return None


def git_commit() -> str | None:
    """The commit of lpvit itself, when it runs from a checkout."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
