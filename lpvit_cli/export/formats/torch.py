"""torch: the packed model folder, for `lpvit_cli.load_model`."""

from __future__ import annotations

import shutil
from pathlib import Path

from lpvit_cli.export.formats.base import Format
from lpvit_cli.export.results import ExportedFile
from lpvit_cli.export.source import Source
from lpvit_cli.progress import Progress

FILES = ("config.json", "model.safetensors")


class Torch(Format):
    def write(self, source: Source, work: Path, progress: Progress) -> ExportedFile:
        for name in FILES:
            shutil.copyfile(source.folder / name, work / name)
        size = sum((work / name).stat().st_size for name in FILES)
        return ExportedFile(format="torch", file="model.safetensors", bytes=size)
