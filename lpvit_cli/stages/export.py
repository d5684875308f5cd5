"""export: files that run without lpvit, checked against the model on real images -> RUN/export/."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from lpvit_cli.errors import UsageError, require
from lpvit_cli.measure.machine import cpu_name, installed
from lpvit_cli.models import load_model, read_config
from lpvit_cli.recipe import Recipe
from lpvit_cli.report.schema import ExportedFile, ExportReport
from lpvit_cli.run import Progress, Run
from lpvit_cli.sparse import order_neurons, trim
from lpvit_cli.stages import EXPORT
from lpvit_cli.stages.evaluate import validation_batches
from lpvit_cli.stages.export_hub import write_hub
from lpvit_cli.stages.export_pt2 import require_compiler, write_aoti, write_pt2
from lpvit_cli.stages.export_triton_server import write_triton_server
from lpvit_cli.stages.exporting import DENSE_FOLDER, Source
from lpvit_cli.stages.lineage import made_by

FLOAT32_ONLY = {"pt2", "aoti", "openvino"}
MADE_OF_ONNX = {"openvino", "triton-server"}


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> ExportReport:
    settings = recipe.export
    if settings.precision != "float32" and not FLOAT32_ONLY.isdisjoint(settings.formats):
        raise UsageError(
            f"export.precision: {', '.join(sorted(FLOAT32_ONLY & set(settings.formats)))} is written in float32 only, "
            f"not in {settings.precision}",
            "leave them out of export.formats, or add --set export.precision=float32",
        )
    asked = set(settings.formats)
    formats = asked | ({"onnx"} if asked & MADE_OF_ONNX else set())
    _require_all(formats)
    folder = run.model_artefact(EXPORT)
    original = load_model(folder)
    model = trim(original)
    order_neurons(model)
    pruned, recovered = made_by(run, EXPORT)
    validation = validation_batches(recipe, original)
    source = Source(recipe, run, folder, read_config(folder), original, model, validation, (recovered or pruned).accuracy)
    for format_, write in WRITERS.items():
        if format_ in formats:
            source.files.append(write(source, work, progress))
    shutil.rmtree(work / DENSE_FOLDER, ignore_errors=True)
    if formats != asked:
        source.notes.append(f"{', '.join(sorted(asked & MADE_OF_ONNX))} needs the ONNX file: it was written too")
    return ExportReport(
        device=cpu_name(),
        notes=source.notes,
        model=folder.name,
        precision=settings.precision,
        accuracy_model=(recovered or pruned).accuracy,
        files=source.files,
        versions={package: installed(package) for package in ("lpvit", "torch", "timm", "onnx", "onnxruntime", "openvino")},
    )


def _require_all(formats: set[str]) -> None:
    """What the formats need, before anything is made."""
    if "onnx" in formats:
        require("onnx", "onnxscript", "onnxruntime")
    if "openvino" in formats:
        require("openvino")
    if "aoti" in formats:
        require_compiler()


def write_onnx(source: Source, work: Path, progress: Progress) -> ExportedFile:
    from lpvit_cli.stages import export_onnx

    return export_onnx.write_onnx(source, work, progress)


def write_openvino(source: Source, work: Path, progress: Progress) -> ExportedFile:
    from lpvit_cli.stages import export_openvino

    return export_openvino.write_openvino(source, work, progress)


def write_torch(source: Source, work: Path, progress: Progress) -> ExportedFile:
    """The packed model folder, for `lpvit_cli.load_model`."""
    names = ("config.json", "model.safetensors")
    for name in names:
        shutil.copyfile(source.folder / name, work / name)
    return ExportedFile(format="torch", file="model.safetensors", bytes=sum((work / name).stat().st_size for name in names))


# in this order: openvino and triton-server take the ONNX file; hub takes it and the notes so far, which are about it
WRITERS: dict[str, Callable[[Source, Path, Progress], ExportedFile]] = {
    "onnx": write_onnx,
    "torch": write_torch,
    "triton-server": write_triton_server,
    "hub": write_hub,
    "openvino": write_openvino,
    "pt2": write_pt2,
    "aoti": write_aoti,
}
