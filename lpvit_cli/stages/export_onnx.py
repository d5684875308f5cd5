"""export to ONNX: block-sparse layers in the forms that onnxruntime runs fastest here, timed against the dense model."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from lpvit_kernels import BlockSparseMatrix
from torch import Tensor, nn

from lpvit_cli.export.choose import choose_forms
from lpvit_cli.export.forms import forms_of
from lpvit_cli.export.layer import Choice, Layer
from lpvit_cli.export.onnx import HALF, as_float32, dense_graph, save_onnx
from lpvit_cli.export.rewrite import rewrite
from lpvit_cli.export.runtime import OnnxModel, session
from lpvit_cli.measure.machine import cpu_name, installed
from lpvit_cli.measure.timing import Subject, time_in_visits, verdict
from lpvit_cli.models import build_model
from lpvit_cli.recipe import ExportSection, ModelSection
from lpvit_cli.report.schema import BASELINE, ExportedFile, ExportedLayer, ExportSpeed
from lpvit_cli.run import Progress
from lpvit_cli.sparse import BlockSparseLinear, densify
from lpvit_cli.stages.calibrate import calibration_batches
from lpvit_cli.stages.exporting import Source, check
from lpvit_cli.stages.tune import layer_tokens

FILE = "model.onnx"
VISITS, SAMPLES = 3, 3  # of each file, in turn
HALF_NOTE = "half precision is for GPUs: speed not measured. There a stock ONNX file runs, but not faster for its sparsity"


def write_onnx(source: Source, work: Path, progress: Progress) -> ExportedFile:
    settings = source.recipe.export
    file, half, threads = work / FILE, settings.precision in HALF, settings.threads or os.cpu_count() or 1
    progress("exporting to ONNX", 0, 1, "")
    layers = exported_layers(source, progress)
    dense = write_dense(source, work)

    def graph_of(choices: dict[str, Choice]) -> ir.Model:
        graph = dense_graph(densify(source.model), settings.opset, settings.precision)
        rewrite(graph, layers, {name: choice.form for name, choice in choices.items()})
        return graph

    candidates = _candidates(source, layers, threads, progress)
    choices, graph, speed = candidates[0], graph_of(candidates[0]), None
    if half:
        source.notes.append(HALF_NOTE)
    else:
        save_onnx(graph, file, source.config)
        speed = _measure(dense, file, settings, threads, progress)
        for other in candidates[1:] if speed.speedup.value < 1 else ():
            tried = graph_of(other)
            save_onnx(tried, file, source.config)
            measured = _measure(dense, file, settings, threads, progress)
            if measured.speedup.value > speed.speedup.value:
                source.notes.append("as a whole, the mix of the fastest forms was slower: all layers are dense")
                choices, graph, speed = other, tried, measured
    written = [
        ExportedLayer(
            name=name,
            shape=layers[name].weight.shape,
            block=layers[name].weight.block,
            density=layers[name].weight.density,
            form=choice.form,
            times_us=choice.times_us,
        )
        for name, choice in choices.items()
    ]
    save_onnx(graph, file, source.config | {"export": _account(settings, written, speed)})
    runnable = file
    if settings.precision == "bfloat16":
        runnable = dense.with_name("checked.onnx")
        as_float32(graph)
        save_onnx(graph, runnable, source.config)
        source.notes.append("onnxruntime's CPU provider has no bfloat16: what was checked is the file with float32 arithmetic")
    parity, result = check(OnnxModel(runnable), source, FILE, progress)
    bytes_dense = _size(dense)
    shutil.rmtree(dense.parent)
    return ExportedFile(
        format="onnx",
        file=FILE,
        bytes=_size(file),
        bytes_dense=bytes_dense,
        parity=parity,
        accuracy=result,
        layers=written,
        speed=speed,
    )


def exported_layers(source: Source, progress: Progress) -> dict[str, Layer]:
    """The linear layers that are written anew: the block-sparse ones, in int8 also those of prune.layers that are dense."""
    precision, prunable = source.recipe.export.precision, source.recipe.prune.layers
    int8 = precision.startswith("int8")
    if source.recipe.export.form == "dense" and not int8:
        return {}
    linears: dict[str, Any] = {
        name: module
        for name, module in source.model.named_modules()
        if isinstance(module, BlockSparseLinear) or (int8 and isinstance(module, nn.Linear) and prunable.match(name))
    }
    ranges = _input_ranges(source, linears, progress) if precision == "int8-static" else {}
    dtype = HALF.get(precision, torch.float32)
    made = {}
    for name, linear in linears.items():
        weight = linear.weight
        if isinstance(linear, nn.Linear):
            weight = BlockSparseMatrix.from_dense(weight.detach(), tuple(weight.shape), torch.ones(1, 1, dtype=torch.bool))
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        made[name] = Layer(name, weight.to(dtype), bias, int8, ranges.get(name))
    return made


def _input_ranges(source: Source, linears: dict[str, nn.Module], progress: Progress) -> dict[str, tuple[float, float]]:
    """Smallest and largest input of each layer: of every image of the calibration data, and then the mean over the images."""
    sums: dict[str, Tensor] = {name: torch.zeros(2) for name in linears}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            by_image = inputs[0].reshape(images, -1)
            sums[name] += torch.stack([by_image.amin(dim=1).sum(), by_image.amax(dim=1).sum()])

        return hook

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    calibration, done = calibration_batches(source.recipe, source.model), 0
    try:
        with torch.inference_mode():
            for batch, _ in calibration:
                images = len(batch)
                source.model(batch)
                done += images
                progress("calibrating int8", done, calibration.images or 0, f"{done} images")
    finally:
        for handle in handles:
            handle.remove()
    return {name: (float(low), float(high)) for name, (low, high) in ((name, total / done) for name, total in sums.items())}


def write_dense(source: Source, work: Path) -> Path:
    """The dense model in float32 with random weights, to measure against: a dense file takes as long whatever it holds."""
    config = source.config
    model = build_model(ModelSection(name=config["architecture"], kwargs=config["kwargs"]))
    folder = work / ".dense"
    folder.mkdir()
    save_onnx(dense_graph(model, source.recipe.export.opset), folder / FILE, {})
    return folder / FILE


def _candidates(source: Source, layers: dict[str, Layer], threads: int, progress: Progress) -> list[dict[str, Choice]]:
    """The forms to try: what was asked for, or else the fastest of each layer, and all dense for when that mix is slower."""
    settings = source.recipe.export
    dense = {name: Choice("dense", {}) for name in layers}
    if settings.form != "auto":
        asked = {name: settings.form if settings.form in forms_of(layer) else "dense" for name, layer in layers.items()}
        return [{name: Choice(form, {}) for name, form in asked.items()}]
    if settings.precision in HALF:
        return [dense]
    tokens = {name: settings.batch_size * rows for name, rows in layer_tokens(source.model, layers).items()}
    chosen = choose_forms(layers, tokens, threads, progress)
    if all(choice.form == "dense" for choice in chosen.values()):
        return [chosen]
    return [chosen, {name: Choice("dense", choice.times_us) for name, choice in chosen.items()}]


def _measure(dense: Path, file: Path, settings: ExportSection, threads: int, progress: Progress) -> ExportSpeed:
    """Both files in turn, one session alive at a time."""

    def open_file(path: Path) -> Subject:
        one = session(path, threads)
        images = one.get_inputs()[0]
        x = np.random.default_rng(0).standard_normal((settings.batch_size, *images.shape[1:]), dtype=np.float32)
        return partial(one.run, None, {images.name: x})

    timing = time_in_visits(
        {BASELINE: partial(open_file, dense), file.name: partial(open_file, file)},
        visits=VISITS,
        samples=SAMPLES,
        threads=threads,
        on_visit=lambda done, total: progress("timing the file", done, total, f"{done}/{total}"),
    )
    ratio = timing.ratio(BASELINE, file.name)
    sentence = verdict(file.name, "dense float32 in onnxruntime", ratio, timing, timing.subjects[file.name])
    return ExportSpeed(threads=threads, batch_size=settings.batch_size, timing=timing, speedup=ratio, verdict=sentence)


def _account(settings: ExportSection, layers: list[ExportedLayer], speed: ExportSpeed | None) -> dict[str, Any]:
    """How the file came about, for its metadata."""
    return {
        "precision": settings.precision,
        "forms": {layer.name: layer.form for layer in layers},
        "times_us": {layer.name: layer.times_us for layer in layers if layer.times_us},
        "speedup_over_dense_float32": speed and dataclasses.asdict(speed.speedup),
        "threads": speed and speed.threads,
        "batch_size": speed and speed.batch_size,
        "cpu": cpu_name(),
        "versions": {package: installed(package) for package in ("lpvit", "torch", "onnxruntime")},
    }


def _size(file: Path) -> int:
    """With its external data."""
    return sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*"))
