"""What a stage of a run is: what it is called, what it writes, and what it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpvit_cli.pipeline.run import Run


def _nothing(run: Run) -> Any:
    return ()


@dataclass(frozen=True)
class Stage:
    """One step of a run. `module` holds `run_stage(recipe, run, work, progress) -> report`; it is imported when it starts.

    Which recipe keys the result depends on is recorded while it runs; `inputs` adds what is no recipe key.
    """

    command: str
    folder: str
    module: str
    report: str  # "module:class" of the report
    summary: str
    upstream: Callable[[Run], Stage | tuple[()]] = _nothing  # whose artefact it goes on from
    sources: Callable[[Run], tuple[Stage, ...]] = _nothing  # whose artefacts it reads besides
    inputs: Callable[[Run], Any] = _nothing  # a mapping of names to JSON values: contents of files, versions
    timed: bool = False  # its numbers hold only on the device they were taken on
    together: bool = False  # runs under torchrun too
    usage: str = ""  # how it is asked for, with {recipe}; "": by command and recipe

    @property
    def function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = import_module(self.module).run_stage
        return function

    @property
    def report_class(self) -> Any:
        module, _, name = self.report.partition(":")
        return getattr(import_module(module), name)
