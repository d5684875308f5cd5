"""onnx: a file that a stock onnxruntime runs, and runs faster for the blocks that are gone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lpvit_cli.errors import require
from lpvit_cli.export.formats.base import Format
from lpvit_cli.progress import Progress

if TYPE_CHECKING:
    from lpvit_cli.export.results import ExportedFile
    from lpvit_cli.export.source import Source
    from lpvit_cli.targets.base import ExportedModel


class Onnx(Format):
    suffix = ".onnx"

    def require(self) -> None:
        require("onnx", "onnxscript", "onnxruntime")

    def write(self, source: Source, work: Path, progress: Progress) -> ExportedFile:
        from lpvit_cli.export.onnx_file import write_onnx

        return write_onnx(source, work, progress)

    def open(self, path: Path) -> ExportedModel:
        from lpvit_cli.targets.onnxruntime import OnnxModel

        return OnnxModel(path)
