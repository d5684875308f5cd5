"""bench: the pruned model against dense ones in one interleaved run: time, memory, energy where a meter is -> RUN/bench/."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from lpvit_cli.bench.notes import advice, doubts
from lpvit_cli.bench.results import BatchBench
from lpvit_cli.bench.session import Bench
from lpvit_cli.bench.subjects import Subjects
from lpvit_cli.data.splits import validation_batches
from lpvit_cli.devices import describe_device, pick_dtype
from lpvit_cli.errors import UsageError, require
from lpvit_cli.files import scratch_in
from lpvit_cli.machine import installed, machine
from lpvit_cli.measure.timing import cpu_threads, current
from lpvit_cli.models.build import build_model
from lpvit_cli.models.folder import load_model, require_same_model
from lpvit_cli.pipeline.run import Run
from lpvit_cli.progress import Progress
from lpvit_cli.recipe import Recipe
from lpvit_cli.report.bench_csv import write_csv
from lpvit_cli.report.html import write_html
from lpvit_cli.report.patches import merged_photos
from lpvit_cli.report.schema import BenchReport
from lpvit_cli.stages import BENCH, EXPORT, made_by


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> BenchReport:
    torch.manual_seed(recipe.seed)
    device = run.target_device
    source = run.model_artefact(BENCH)
    require_same_model(source, recipe.model)
    onnx_file = _onnx_file(recipe, run)
    batches: list[BatchBench] = []
    notes: list[str] = []
    with cpu_threads(recipe.target.threads), current(device), scratch_in(work) as scratch:
        for dtype in dict.fromkeys(pick_dtype(name, device) for name in recipe.target_dtypes):
            subjects = Subjects(
                recipe.subjects,
                build_model(recipe.model, recipe.task, recipe.features),
                source,
                device,
                dtype,
                scratch,
                recipe.export.opset if any("dense-onnx" in name for name in recipe.subjects) else 0,
                recipe.prune.layers.match,
                onnx_file,
                recipe.bench.baseline,
            )
            bench = Bench(recipe.bench, subjects, recipe.seed, progress)
            bench.measure_all()
            batches += bench.batches
            notes += bench.notes
            del bench  # its models leave the device before those of the next type come
        pruned, finetuned = made_by(run, BENCH)
        report = BenchReport(
            device=describe_device(device),
            notes=[*dict.fromkeys(notes), *advice(batches), *doubts(batches)],
            model=source.name,
            threads=torch.get_num_threads(),
            machine=machine(),
            versions={package: installed(package) for package in ("lpvit", "torch", "timm", "triton", "onnxruntime")},
            flops_dense=pruned.flops_dense,
            flops=pruned.flops,
            batches=batches,
        )
    photos = merged_photos(load_model(source), partial(validation_batches, recipe.data)) if pruned.merged else []
    write_html(work / "report.html", recipe.name, report, pruned, finetuned, photos)
    write_csv(work / "report.csv", report)
    return report


def _onnx_file(recipe: Recipe, run: Run) -> Path | None:
    """What `lpvit export` wrote, where bench measures it."""
    if not any("onnx" in name for name in recipe.subjects):
        return None
    require("onnx", "onnxscript", "onnxruntime")
    if "onnx" not in recipe.subjects:
        return None
    file = run.artefact(EXPORT) / "model.onnx"
    if not file.is_file():
        raise UsageError(f"{file}: not there", f"run: {run.command(EXPORT)} --format onnx")
    return file
