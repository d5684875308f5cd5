"""export to a model repository of NVIDIA's Triton Inference Server, which runs the ONNX file in onnxruntime."""

from __future__ import annotations

import re
from pathlib import Path

from lpvit_cli.export.documents import document, preprocessing_steps
from lpvit_cli.report.schema import ExportedFile
from lpvit_cli.run import Progress
from lpvit_cli.stages.exporting import Source, link

FOLDER = "triton-server"
MAX_BATCH_SIZE = 64


def write_triton_server(source: Source, work: Path, progress: Progress) -> ExportedFile:
    """MODEL/config.pbtxt, MODEL/1/model.onnx, and a README.md on preprocessing and how to start the server."""
    recipe = source.recipe
    name = re.sub(r"[^A-Za-z0-9_-]", "_", recipe.name)
    version = work / FOLDER / name / "1"
    version.mkdir(parents=True)
    onnx_file = next(file for file in source.files if file.format == "onnx")
    for path in work.glob(f"{onnx_file.file}*"):  # with its external data
        link(path, version / path.name)
    values = {
        "name": name,
        "max_batch_size": MAX_BATCH_SIZE,
        "preferred": [8, 16, 32, MAX_BATCH_SIZE],
        "input_size": source.model.pretrained_cfg["input_size"],
        "num_classes": source.model.num_classes,
        "kind": "KIND_CPU" if recipe.export.precision.startswith("int8") else "KIND_AUTO",  # int8 products are the CPU's
        "threads": recipe.export.threads,
        "steps": preprocessing_steps(source.model),
    }
    (version.parent / "config.pbtxt").write_text(document("triton_config.pbtxt", **values))
    (work / FOLDER / "README.md").write_text(document("triton_readme.md", **values))
    return ExportedFile(format="triton-server", file=f"{FOLDER}/{name}", bytes=onnx_file.bytes)
