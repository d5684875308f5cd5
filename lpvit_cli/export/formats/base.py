"""What an export format is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from lpvit_cli.progress import Progress

if TYPE_CHECKING:
    from lpvit_cli.export.results import ExportedFile
    from lpvit_cli.export.source import Source
    from lpvit_cli.targets.base import ExportedModel


class Format(ABC):
    """One way to write a model. Importing it must need nothing beyond lpvit: what it needs, `require` asks for."""

    precisions: tuple[str, ...] = ("float32", "float16", "bfloat16", "int8", "int8-static")  # it can be asked for in
    made_of: str | None = None  # another format, whose file it is made of
    suffix: str | None = None  # of files that `open` runs

    def require(self) -> None:
        """Raise EnvironmentFault where this machine lacks what the format needs."""
        return

    @abstractmethod
    def write(self, source: Source, work: Path, progress: Progress) -> ExportedFile:
        """Write into the folder `work`, and check what was written. Raises CheckFailed where it is not the model."""

    def open(self, path: Path) -> ExportedModel:
        """A file of this format, ready to run on the CPU."""
        raise NotImplementedError
