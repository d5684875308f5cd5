"""export: ONNX, checked against the model on real images, with the packed weights beside it -> RUN/export/."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from lpvit_cli.errors import CheckFailed, require
from lpvit_cli.export.onnx import export_onnx
from lpvit_cli.export.parity import agreement, relative_error
from lpvit_cli.export.runtime import OnnxModel
from lpvit_cli.measure.machine import cpu_name, installed
from lpvit_cli.models import load_model, read_config
from lpvit_cli.recipe import Recipe
from lpvit_cli.report.schema import ExportReport, Parity
from lpvit_cli.run import Progress, Run
from lpvit_cli.sparse import densify
from lpvit_cli.stages import EXPORT
from lpvit_cli.stages.evaluate import evaluate_model, validation_batches

BATCH_SIZES = (1, 2, 7)


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> ExportReport:
    require("onnx", "onnxscript", "onnxruntime")
    parent = run.model_artefact(EXPORT)
    model = load_model(parent)
    validation = validation_batches(recipe, model)

    file = work / "model.onnx"
    progress("exporting to ONNX", 0, 1, "")
    export_onnx(densify(model), file, recipe.export.opset, read_config(parent))
    exported = OnnxModel(file)

    images = first_images(validation, sum(BATCH_SIZES))
    parity = []
    with torch.inference_mode():
        for batch in images.split(BATCH_SIZES):
            logits, reference = exported(batch), model(batch)
            parity.append(
                Parity(
                    batch_size=len(batch),
                    relative_error=relative_error(logits, reference),
                    agreement=agreement(logits, reference, recipe.export.tolerance),
                )
            )
    require_parity(parity, recipe.export.tolerance)
    result = evaluate_model(exported, validation, recipe, torch.device("cpu"), progress, "evaluating the exported file")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(parent / name, work / name)
    return ExportReport(
        device=f"{cpu_name()}, onnxruntime",
        notes=["the ONNX file is dense: its zeros are stored and multiplied; the packed weights beside it are the small ones"],
        model=parent.name,
        file=file.name,
        bytes=sum(path.stat().st_size for path in work.glob("model.onnx*")),
        opset=recipe.export.opset,
        parity=parity,
        accuracy=result,
        versions={package: installed(package) for package in ("torch", "onnx", "onnxscript", "onnxruntime")},
    )


def first_images(batches: object, count: int) -> Tensor:
    """The first `count` images [count, 3, H, W], repeated where the split holds fewer."""
    images = torch.empty(0)
    for batch, _ in batches:  # type: ignore[attr-defined]
        images = torch.cat([images, batch]) if len(images) else batch
        if len(images) >= count:
            break
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]


def require_parity(parity: list[Parity], tolerance: float) -> None:
    for result in parity:
        if not result.relative_error <= tolerance or result.agreement < 1:
            raise CheckFailed(
                f"export: the ONNX file disagrees with the model at batch {result.batch_size}: relative error "
                f"{result.relative_error:.1e} (at most {tolerance:.0e}), same top-1 for {result.agreement:.0%} of the images",
                "try another export.opset, or report the model; nothing was written",
            )
