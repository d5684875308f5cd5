"""export for OpenVINO: the ONNX file converted, and timed against the dense one in OpenVINO."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np

from lpvit_cli.export.openvino import OpenVinoModel, compiled, save_openvino
from lpvit_cli.measure.timing import Subject, time_in_visits, verdict
from lpvit_cli.report.schema import BASELINE, ExportedFile, ExportSpeed
from lpvit_cli.run import Progress
from lpvit_cli.stages import export_onnx
from lpvit_cli.stages.exporting import Source, check

FILE = "model.xml"


def write_openvino(source: Source, work: Path, progress: Progress) -> ExportedFile:
    """RUN/export/model.xml and model.bin, from the ONNX file in the same folder."""
    progress("converting for OpenVINO", 0, 1, "")
    file = work / FILE
    save_openvino(work / export_onnx.FILE, file, source.config)
    parity, result = check(OpenVinoModel(file), source, FILE, progress)
    dense = export_onnx.write_dense(source, work)
    speed = _measure(dense, file, source, progress)
    shutil.rmtree(dense.parent)
    weights = file.with_suffix(".bin")
    return ExportedFile(
        format="openvino",
        file=FILE,
        bytes=file.stat().st_size + weights.stat().st_size,
        parity=parity,
        accuracy=result,
        speed=speed,
    )


def _measure(dense: Path, file: Path, source: Source, progress: Progress) -> ExportSpeed:
    settings = source.recipe.export
    threads = settings.threads or os.cpu_count() or 1
    size = (settings.batch_size, *source.config["preprocessing"]["input_size"])
    x = np.random.default_rng(0).standard_normal(size, dtype=np.float32)

    def open_file(path: Path) -> Subject:
        return partial(compiled(path, threads), x)

    timing = time_in_visits(
        {BASELINE: partial(open_file, dense), FILE: partial(open_file, file)},
        visits=export_onnx.VISITS,
        samples=export_onnx.SAMPLES,
        threads=threads,
        on_visit=lambda done, total: progress("timing in OpenVINO", done, total, f"{done}/{total}"),
    )
    ratio = timing.ratio(BASELINE, FILE)
    sentence = verdict(FILE, "dense float32 in OpenVINO", ratio, timing, timing.subjects[FILE])
    return ExportSpeed(threads=threads, batch_size=settings.batch_size, timing=timing, speedup=ratio, verdict=sentence)
