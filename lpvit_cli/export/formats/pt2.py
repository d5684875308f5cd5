"""pt2: torch's own program format; `torch.export.load(file).module()(images)` runs it in plain torch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from lpvit_cli.export.formats.base import Format
from lpvit_cli.export.program_file import write_program
from lpvit_cli.export.results import ExportedFile
from lpvit_cli.export.source import Source
from lpvit_cli.progress import Progress
from lpvit_cli.targets.base import ExportedModel
from lpvit_cli.targets.pt2 import EXTRA_FILE, TorchProgram

FILE = "model.pt2"


class Pt2(Format):
    precisions = ("float32",)
    suffix = ".pt2"

    def write(self, source: Source, work: Path, progress: Progress) -> ExportedFile:
        def save(program: ExportedProgram, metadata: str) -> None:
            torch.export.save(program, work / FILE, extra_files={EXTRA_FILE: metadata})

        return write_program("pt2", FILE, save, source, work, progress)

    def open(self, path: Path) -> ExportedModel:
        return TorchProgram(path)
