"""openvino: the ONNX file converted to OpenVINO's own format, and timed against the dense one in OpenVINO."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpvit_cli.errors import require
from lpvit_cli.export.formats.base import Format
from lpvit_cli.progress import Progress

if TYPE_CHECKING:
    from lpvit_cli.export.results import ExportedFile
    from lpvit_cli.export.source import Source
    from lpvit_cli.targets.base import ExportedModel

FILE = "model.xml"


class OpenVino(Format):
    precisions = ("float32",)
    made_of = "onnx"
    suffix = ".xml"

    def require(self) -> None:
        require("openvino")

    def write(self, source: Source, work: Path, progress: Progress) -> ExportedFile:
        """model.xml and model.bin, from the ONNX file in the same folder."""
        from lpvit_cli.export.check import check
        from lpvit_cli.export.onnx_file import FILE as ONNX_FILE
        from lpvit_cli.export.onnx_file import OPENVINO, free_forms
        from lpvit_cli.export.results import ExportedFile
        from lpvit_cli.export.speed import measure
        from lpvit_cli.targets.openvino import OpenVinoModel, open_compiled

        progress("converting for OpenVINO", 0, 1, "")
        file = work / FILE
        save_openvino(work / ONNX_FILE, file, source.config)
        parity, result = check(OpenVinoModel(file), source, FILE)
        free = sorted(free_forms(source, work), key=lambda form: form.name != OPENVINO)
        open_file = partial(open_compiled, file, source.threads, source.images)
        return ExportedFile(
            format="openvino",
            file=FILE,
            bytes=file.stat().st_size + file.with_suffix(".bin").stat().st_size,
            parity=parity,
            quality=result,
            speed=measure(source, FILE, open_file, free, progress),
        )

    def open(self, path: Path) -> ExportedModel:
        from lpvit_cli.targets.openvino import OpenVinoModel

        return OpenVinoModel(path)


def save_openvino(onnx_file: Path, path: Path, metadata: dict[str, Any]) -> None:
    """Write `path` (.xml; the weights beside it, .bin), in the types of the ONNX file."""
    import openvino

    from lpvit_cli.targets.base import METADATA_KEY

    model = openvino.convert_model(onnx_file)
    model.set_rt_info(json.dumps(metadata), METADATA_KEY)
    openvino.save_model(model, path, compress_to_fp16=False)
