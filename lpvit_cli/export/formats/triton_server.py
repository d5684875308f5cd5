"""triton-server: a model repository of NVIDIA's Triton Inference Server, which runs the ONNX file in onnxruntime."""

from __future__ import annotations

import re
from pathlib import Path

from lpvit_cli.export.documents import document, output_name, output_size, preprocessing_steps
from lpvit_cli.export.formats.base import Format
from lpvit_cli.export.results import ExportedFile
from lpvit_cli.export.source import Source, link
from lpvit_cli.progress import Progress

FOLDER = "triton-server"
MAX_BATCH_SIZE = 64


class TritonServer(Format):
    made_of = "onnx"

    def write(self, source: Source, work: Path, progress: Progress) -> ExportedFile:
        """MODEL/config.pbtxt, MODEL/1/model.onnx, and a README.md on preprocessing and how to start the server."""
        name = re.sub(r"[^A-Za-z0-9_-]", "_", source.name)
        version = work / FOLDER / name / "1"
        version.mkdir(parents=True)
        onnx_file = source.file("onnx")
        assert onnx_file is not None
        for path in work.glob(f"{onnx_file.file}*"):  # with its external data
            link(path, version / path.name)
        values = {
            "name": name,
            "max_batch_size": MAX_BATCH_SIZE,
            "preferred": [8, 16, 32, MAX_BATCH_SIZE],
            "input_size": source.model.pretrained_cfg["input_size"],
            "output": output_name(source.model),
            "output_size": output_size(source.model),
            "kind": "KIND_CPU" if source.precision.startswith("int8") else "KIND_AUTO",  # int8 products are the CPU's
            "threads": source.asked_threads,
            "steps": preprocessing_steps(source.model),
        }
        (version.parent / "config.pbtxt").write_text(document("triton_config.pbtxt", **values))
        (work / FOLDER / "README.md").write_text(document("triton_readme.md", **values))
        return ExportedFile(format="triton-server", file=f"{FOLDER}/{name}", bytes=onnx_file.bytes)
