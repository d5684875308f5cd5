"""export: files that run without lpvit, checked against the model on real images -> RUN/export/."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import torch

from lpvit_cli.data.splits import calibration_batches
from lpvit_cli.export.formats import require_possible, unasked, with_what_they_need
from lpvit_cli.export.source import DENSE_FOLDER, Publication, Source, public_config
from lpvit_cli.files import require_temporary_folder
from lpvit_cli.machine import cpu_name, installed
from lpvit_cli.models.build import build_model, create
from lpvit_cli.models.folder import load_model, read_config
from lpvit_cli.models.trim import order_neurons, trim
from lpvit_cli.pipeline.run import Run
from lpvit_cli.progress import Progress
from lpvit_cli.recipe import Recipe
from lpvit_cli.report.schema import ExportReport
from lpvit_cli.stages import BENCH, EXPORT, made_by
from lpvit_cli.tasks.evaluation import validation_of


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> ExportReport:
    asked = recipe.export.formats
    formats = with_what_they_need(asked)
    require_possible(formats, recipe.file_precision)
    require_temporary_folder()
    source = _source(recipe, run, progress)
    for name, format_ in formats.items():
        before = len(source.notes)
        source.files.append(format_.write(source, work, progress))
        source.notes_by_format[name] = source.notes[before:]
    shutil.rmtree(work / DENSE_FOLDER, ignore_errors=True)
    source.notes.extend(unasked(formats, asked))
    return ExportReport(
        device=cpu_name(),
        notes=source.notes,
        model=source.folder.name,
        precision=source.precision,
        quality_model=source.quality,
        files=source.files,
        versions={package: installed(package) for package in ("lpvit", "torch", "timm", "onnx", "onnxruntime", "openvino")},
    )


def _source(recipe: Recipe, run: Run, progress: Progress) -> Source:
    target, folder = recipe.target, run.model_artefact(EXPORT)
    original, config = load_model(folder), read_config(folder)
    model = trim(original)
    order_neurons(model)
    pruned, recovered = made_by(run, EXPORT)
    trained = partial(build_model, recipe.model, recipe.task, recipe.features)
    dense = trained() if (recovered or pruned).quality.accuracy is None else None  # where labels say nothing, judged beside it
    return Source(
        name=recipe.name,
        settings=recipe.export,
        precision=recipe.file_precision,
        threads=target.threads or os.cpu_count() or 1,
        asked_threads=target.threads,
        batch_size=target.batch_size,
        folder=folder,
        config=public_config(config),
        original=original,
        model=model,
        validation=validation_of(recipe.data, recipe.calibrate, original, dense, torch.device("cpu"), torch.float32, progress),
        quality=(recovered or pruned).quality,
        quality_dense=pruned.quality_dense,
        prunable=recipe.prune.layers.match,
        calibration=partial(calibration_batches, recipe.data, recipe.calibrate, recipe.seed, model),
        dense=partial(create, config),
        trained=trained,
        publication=partial(publication, recipe, run),
    )


def publication(recipe: Recipe, run: Run) -> Publication:
    """What the model card tells; of bench only if it measured the model that is exported."""
    pruned, recovered = made_by(run, EXPORT)
    measured, model = run.record(BENCH), run.upstream(BENCH)
    record = run.record(model) if model else None
    same = measured and record and model and measured.inputs.get(model.folder) == record.fingerprint
    return Publication(recipe, pruned, recovered, run.report(BENCH) if same else None)
