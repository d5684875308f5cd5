"""A run folder: what has been made from a recipe, whether it still holds, and how a new artefact gets in.

A stage writes into a temporary sibling that is renamed when it is complete, so a kill never leaves half an artefact.
`stage.json` beside each artefact lists everything its content depends on; a stage is skipped while nothing of that has changed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpvit_cli import __version__, distributed
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.files import beside, clear, content_id, digest, discard, publish, replace_text, writing
from lpvit_cli.pipeline.claim import RECIPE, claimed, require_own_folder
from lpvit_cli.pipeline.record import Begun, Record, differences, has_state, values_of
from lpvit_cli.pipeline.stage import Stage
from lpvit_cli.progress import Progress
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recipe.section import Reads, recording

if TYPE_CHECKING:
    import torch


class Run:
    """RUN/, bound to the recipe at hand. `stages`: all that may have an artefact there; `asked`: what the user calls it."""

    def __init__(self, recipe: Recipe, folder: Path, stages: Sequence[Stage], asked: str = ""):
        self.recipe, self.folder, self.stages, self.asked = recipe, folder, stages, asked or recipe.name
        self.origin: ModelSection | None = None  # the model that others are compared with, where it is not the recipe's
        self._reads = Reads()  # of the stage that is at work
        self._content_of = cache(content_id)  # a folder of a million images is walked once

    @cached_property
    def device(self) -> torch.device:
        """Where lpvit works."""
        from lpvit_cli.devices import pick_device

        return pick_device(self.recipe.peek("device"))

    @cached_property
    def target_device(self) -> torch.device:
        """Where the model will run."""
        from lpvit_cli.devices import pick_device

        return pick_device(self.recipe.target_device)

    @contextmanager
    def open(self, overwrite: bool = False) -> Iterator[None]:
        """Claim the folder for this recipe and process; refuse one that belongs to something else.

        Of several processes the main one claims it, and only that one writes.
        """
        if not distributed.is_main():
            distributed.broadcast(None)
            yield
            return
        with claimed(self.folder, self.recipe.name, sorted(self._artefacts), overwrite):
            replace_text(self.folder / RECIPE, self.recipe.to_yaml())
            distributed.broadcast(None)
            yield

    # what an artefact depends on

    def upstream(self, stage: Stage) -> Stage | None:
        """The stage whose artefact this one goes on from."""
        return stage.upstream(self) or None

    def sources(self, stage: Stage) -> list[Stage]:
        """The stages of this run whose artefacts this one reads."""
        before = self.upstream(stage)
        return [*([before] if before else []), *stage.sources(self)]

    def inputs(self, stage: Stage, reads: list[str]) -> dict[str, Any]:
        """Everything an artefact depends on that was made by reading these recipe keys: flat names and JSON values."""
        inputs = values_of(self.recipe, reads, self._content_of)
        inputs |= {"versions.lpvit": __version__, "versions.torch": version("torch"), "versions.timm": version("timm")}
        if before := self.upstream(stage):
            record = self.record(before)
            inputs[before.folder] = record.fingerprint if record else None
        inputs |= dict(stage.inputs(self))
        if stage.timed:
            from lpvit_cli.devices import describe_device

            inputs["measured on"] = describe_device(self.target_device)
        return inputs

    def record(self, stage: Stage) -> Record | None:
        return Record.load(self.folder / stage.folder)

    def changes(self, stage: Stage) -> list[str] | None:
        """Why the artefact does not hold any more: [] it holds; None there is none."""
        record = self.record(stage)
        if record is None:
            return None
        for before in self.sources(stage):
            if earlier := self.changes(before):
                return [f"{before.folder}: {earlier[0]}"]
        old, new = record.inputs, self.inputs(stage, record.reads)
        return [
            f"{key} was made again" if key in self._artefacts else f"{key}: {old.get(key, 'none')} -> {new.get(key, 'none')}"
            for key in differences(old, new)
        ]

    @property
    def _artefacts(self) -> set[str]:
        return {stage.folder for stage in self.stages}

    def command(self, stage: Stage) -> str:
        """What makes a stage's artefact in this folder."""
        elsewhere = self.folder != Path("runs") / self.recipe.name
        usage = stage.usage or f"{stage.command} {{recipe}}"
        return f"lpvit {usage.format(recipe=self.asked)}" + f" --output {self.folder}" * elsewhere

    def artefact(self, stage: Stage) -> Path:
        """Folder of an artefact that holds, or a UsageError that says which command makes it."""
        changes = distributed.on_main(lambda: self.changes(stage))
        if changes is None:
            raise UsageError(f"{self.folder}: nothing from `{stage.command}` there yet", f"run: {self.command(stage)}")
        if changes:
            raise UsageError(
                f"{self.folder / stage.folder} was made with other settings ({changes[0]})",
                f"run `lpvit {stage.command}` again with the same recipe and --set options, or `lpvit run`",
            )
        return self.folder / stage.folder

    def model_artefact(self, stage: Stage) -> Path:
        """The model folder that a stage takes: the artefact it goes on from."""
        before = self.upstream(stage)
        assert before is not None
        return self.artefact(before)

    def report(self, stage: Stage) -> Any:
        """The report of an artefact; an EnvironmentFault where another lpvit has written it."""
        path = self.folder / stage.folder / "report.json"
        try:
            return stage.report_class.model_validate_json(path.read_text())
        except (OSError, ValueError) as error:
            raise EnvironmentFault(
                f"{path}: not a report of this version of lpvit", f"make it again: {self.command(stage)} --no-resume"
            ) from error

    # progress that a killed stage goes on from

    def progress_folder(self, stage: Stage) -> Path:
        """Where a long stage may keep restartable progress; it goes when the artefact is published or its inputs change."""
        folder = self._progress_path(stage)
        reads = self._reads

        def write() -> None:
            keys = list(reads.keys)
            Begun(keys, self.inputs(stage, keys)).save(folder)

        if distributed.is_main():
            folder.mkdir(exist_ok=True)
            reads.on_new = write  # what is read from now on counts too
            write()
        return folder

    def _progress_path(self, stage: Stage) -> Path:
        return beside(self.folder / stage.folder, "progress")

    def _goes_on(self, stage: Stage) -> bool:
        """Whether there is progress, of the same inputs. Where other settings would lose it a UsageError says which, unless
        what the stage reads was made again, which spoils it."""
        folder = self._progress_path(stage)
        begun = Begun.load(folder)
        if begun is None:
            return False
        old, new = begun.inputs, self.inputs(stage, begun.reads)
        changed = differences(old, new)
        if changed and has_state(folder) and not self._artefacts & set(changed):
            key, more = changed[0], f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UsageError(
                f"{self.folder}: an interrupted {stage.command} was begun with other settings: {key} was "
                f"{old.get(key, 'none')}, is {new.get(key, 'none')}{more}",
                "go on with the old settings, or start anew with --no-resume",
            )
        return not changed

    # making an artefact

    def execute(self, stage: Stage, progress: Progress, resume: bool = True) -> Any:
        """Run one stage and publish what it made; returns its report."""
        self.inputs(stage, [])  # a device that is not there is told before what is to be made for it
        distributed.on_main(lambda: require_own_folder(self.folder / stage.folder))
        for before in self.sources(stage):
            self.artefact(before)
        if not distributed.is_main():
            distributed.broadcast(None)  # leftovers of other settings are gone
            with tempfile.TemporaryDirectory() as scratch:
                return stage.function(self.recipe, self, Path(scratch), progress)
        artefact, kept = self.folder / stage.folder, self._progress_path(stage)
        work = beside(artefact, "partial")
        goes_on = resume and self._goes_on(stage)
        with writing(artefact):
            if not goes_on:
                discard(kept, work)
            distributed.broadcast(None)
            started = time.monotonic()
            self._reads = Reads()
            clear(work)
            work.mkdir()
            try:
                with recording(self._reads):
                    report = stage.function(self.recipe, self, work, progress)
                replace_text(work / "report.json", report.model_dump_json(indent=1))
                self._record(stage, report.device, time.monotonic() - started).save(work)
                publish(work, artefact)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
        with suppress(OSError):  # the artefact stands; the next process that opens the folder tidies
            discard(kept, work)
        return report

    def _record(self, stage: Stage, device: str, seconds: float) -> Record:
        reads = list(self._reads.keys)
        inputs = self.inputs(stage, reads)
        return Record(
            stage=stage.command,
            fingerprint=digest(inputs),
            reads=reads,
            inputs=inputs,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            duration_s=round(seconds, 1),
            command=" ".join(sys.argv),
            git_commit=git_commit(),
            device=device,
        )


def git_commit() -> str | None:
    """The commit of lpvit itself, when it runs from a checkout."""
    checkout = Path(__file__).parent.parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
