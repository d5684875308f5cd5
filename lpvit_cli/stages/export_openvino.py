"""export for OpenVINO: the ONNX file converted, and timed against the dense one in OpenVINO."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lpvit_cli.export.openvino import OpenVinoModel, compiled, save_openvino
from lpvit_cli.measure.timing import Subject
from lpvit_cli.report.schema import ExportedFile
from lpvit_cli.run import Progress
from lpvit_cli.stages import export_onnx
from lpvit_cli.stages.exporting import Source, check, measure

FILE = "model.xml"


def write_openvino(source: Source, work: Path, progress: Progress) -> ExportedFile:
    """RUN/export/model.xml and model.bin, from the ONNX file in the same folder."""
    progress("converting for OpenVINO", 0, 1, "")
    file = work / FILE
    save_openvino(work / export_onnx.FILE, file, source.config)
    parity, result = check(OpenVinoModel(file), source, FILE, progress)
    dense = export_onnx.dense_file(source, work)
    return ExportedFile(
        format="openvino",
        file=FILE,
        bytes=file.stat().st_size + file.with_suffix(".bin").stat().st_size,
        parity=parity,
        accuracy=result,
        speed=measure(source, "OpenVINO", FILE, partial(_open, dense, source), partial(_open, file, source), progress),
    )


def _open(path: Path, source: Source) -> Subject:
    return partial(compiled(path, source.threads), source.images.numpy())
