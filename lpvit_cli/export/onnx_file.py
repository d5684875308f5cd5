"""The ONNX file: block-sparse layers in the forms that onnxruntime runs fastest here, timed against the dense model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from lpvit_kernels import BlockSparseMatrix
from torch import Tensor, nn

from lpvit_cli.errors import CheckFailed, LpvitError
from lpvit_cli.export.check import check, describe
from lpvit_cli.export.choose import choose_forms
from lpvit_cli.export.forms import forms_of
from lpvit_cli.export.graph import HALF, as_float32, dense_graph, save_onnx
from lpvit_cli.export.layer import ExportLayer, FormChoice
from lpvit_cli.export.results import ExportedFile, ExportedLayer, ExportSpeed
from lpvit_cli.export.rewrite import rewrite
from lpvit_cli.export.source import DENSE_FOLDER, Source
from lpvit_cli.export.speed import Free, measure
from lpvit_cli.machine import cpu_features, cpu_name, installed
from lpvit_cli.measure.timing import Subject
from lpvit_cli.progress import Progress
from lpvit_cli.sparse import BlockSparseLinear, densify
from lpvit_cli.targets.onnxruntime import OnnxModel, session
from lpvit_cli.targets.openvino import open_compiled

FILE, DENSE_INT8 = "model.onnx", "int8.onnx"
INT8, OPENVINO = "dense int8 in onnxruntime", "dense float32 in OpenVINO"
NO_VNNI = "this CPU has no VNNI: onnxruntime's int8 products are slow and may saturate, and another CPU may get other outputs"
HALF_NOTE = "half precision is for GPUs: speed not measured. There a stock ONNX file runs, but not faster for its sparsity"


def write_onnx(source: Source, work: Path, progress: Progress) -> ExportedFile:
    settings, file = source.settings, work / FILE
    progress("exporting to ONNX", 0, 1, "")
    layers = exported_layers(source.model, source.precision, settings.form, source.prunable)
    if source.precision == "int8-static":
        layers = _with_ranges(layers, source, progress)
    dense = dense_file(source, work)
    free = [] if source.precision in HALF else free_forms(source, work)

    def graph_of(choices: dict[str, FormChoice]) -> ir.Model:
        return sparse_graph(source.model, layers, choices, settings.opset, source.precision)

    def speed_of(graph: ir.Model) -> ExportSpeed:
        save_onnx(graph, file, source.config)
        return measure(source, FILE, partial(_open, file, source), free, progress)

    candidates = _candidates(source, layers, progress)
    choices, graph, speed = candidates[0], graph_of(candidates[0]), None
    if source.precision in HALF:
        source.notes.append(HALF_NOTE)
    else:
        speed = speed_of(graph)
        if (ratio := _over_dense(speed, source.precision)) < 1 and len(candidates) > 1:
            other = graph_of(candidates[1])
            if _over_dense(measured := speed_of(other), source.precision) > ratio:
                source.notes.append("as a whole, the mix of the fastest forms was slower: all layers are dense")
                choices, graph, speed = candidates[1], other, measured
    written = describe(layers, choices)
    save_onnx(graph, file, source.config | {"export": _account(source.precision, written, speed)})
    runnable = file
    if source.precision == "bfloat16":
        runnable = dense.with_name("checked.onnx")
        as_float32(graph)
        save_onnx(graph, runnable, source.config)
        source.notes.append("onnxruntime's CPU provider has no bfloat16: what was checked is the file with float32 arithmetic")
    parity, result = check(OnnxModel(runnable), source, FILE)
    if source.precision.startswith("int8") and cpu_features().get("VNNI") is False:
        now, before = result.figures[0], source.quality.figures[0]
        source.notes.append(f"{NO_VNNI}: here the file has {now.name} {now.text}, the model {before.text}")
    return ExportedFile(
        format="onnx",
        file=FILE,
        bytes=_size(file),
        bytes_dense=_size(dense),
        parity=parity,
        quality=result,
        layers=written,
        speed=speed,
    )


def sparse_graph(
    model: nn.Module,
    layers: Mapping[str, ExportLayer],
    choices: Mapping[str, FormChoice],
    opset: int,
    precision: str,
    example: Tensor | None = None,
) -> ir.Model:
    """The graph of a model whose `layers` are written in the forms chosen; the rest as in `dense_graph`."""
    graph = dense_graph(_told_apart(model, layers), opset, precision, example)
    rewrite(graph, layers, {name: choice.form for name, choice in choices.items()})
    return graph


def write_dense(
    model: nn.Module, prunable: Callable[[str], bool], opset: int, folder: Path, metadata: dict[str, Any], int8: bool
) -> None:
    """FILE, the dense model in float32, and with `int8` DENSE_INT8, as `export.precision: int8` writes it, nothing removed.

    Raises CheckFailed; FILE may be there then."""
    layers = exported_layers(model, "int8", "auto", prunable) if int8 else {}
    graph = dense_graph(_told_apart(model, layers), opset)
    save_onnx(graph, folder / FILE, metadata)
    if layers:
        rewrite(graph, layers, dict.fromkeys(layers, "dense"))
        save_onnx(graph, folder / DENSE_INT8, metadata)


def _told_apart(model: nn.Module, layers: Iterable[str]) -> nn.Module:
    """A dense copy, in which two layers of zeros on one input do not become one; what stands in `layers` is written anew."""
    dense = densify(model)
    for number, name in enumerate(layers, start=1):
        weight: Any = dense.get_submodule(name).weight
        if not weight.any():
            weight.data[0, 0] = number
    return dense


def exported_layers(model: nn.Module, precision: str, form: str, prunable: Callable[[str], bool]) -> dict[str, ExportLayer]:
    """The linear layers that are written anew: the block-sparse ones, in int8 also those `prunable` ones that are dense."""
    int8 = precision.startswith("int8")
    if form == "dense" and not int8:
        return {}
    linears: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BlockSparseLinear) or (int8 and isinstance(module, nn.Linear) and prunable(name))
    }
    dtype = HALF.get(precision, torch.float32)
    made = {}
    for name, linear in linears.items():
        weight = linear.weight
        if isinstance(linear, nn.Linear):
            weight = BlockSparseMatrix.from_dense(weight.detach(), tuple(weight.shape), torch.ones(1, 1, dtype=torch.bool))
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        made[name] = ExportLayer(name, weight.to(dtype), bias, int8)
    return made


def _with_ranges(layers: dict[str, ExportLayer], source: Source, progress: Progress) -> dict[str, ExportLayer]:
    ranges = _input_ranges(source, {name: source.model.get_submodule(name) for name in layers}, progress)
    return {name: dataclasses.replace(layer, x_range=ranges[name]) for name, layer in layers.items()}


def _input_ranges(source: Source, linears: dict[str, nn.Module], progress: Progress) -> dict[str, tuple[float, float]]:
    """Smallest and largest input of each layer: of every image of the calibration data, and then the mean over the images."""
    sums: dict[str, Tensor] = {name: torch.zeros(2) for name in linears}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            by_image = inputs[0].reshape(images, -1)
            sums[name] += torch.stack([by_image.amin(dim=1).sum(), by_image.amax(dim=1).sum()])

        return hook

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    calibration, done = source.calibration(), 0
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


def dense_file(source: Source, work: Path) -> Path:
    """The dense model in float32, to measure against; made once for all formats, in int8 too where speed is measured."""
    path = work / DENSE_FOLDER / FILE
    if not path.exists():
        path.parent.mkdir()
        try:
            model = source.trained()
        except LpvitError as error:
            source.notes.append(f"the quality of {INT8} is not known: {error.message}")
            source.qualities[INT8] = None
            model = source.dense()
        int8 = source.precision not in HALF
        try:
            write_dense(model, source.prunable, source.settings.opset, path.parent, source.config, int8)
        except CheckFailed as error:
            if not path.exists():
                raise
            source.notes.append(f"{INT8} was not measured: {error.message}")
    return path


def free_forms(source: Source, work: Path) -> list[Free]:
    """The dense model in float32 and int8 in onnxruntime, and in float32 in OpenVINO where that format is asked for."""
    float32 = dense_file(source, work)
    int8 = float32.with_name(DENSE_INT8)
    free = [Free("dense float32 in onnxruntime", partial(_open, float32, source))]
    if int8.exists():

        def judge() -> Any:
            return source.validation.quality(OnnxModel(int8), f"evaluating {INT8}")

        free.append(Free(INT8, partial(_open, int8, source), judge))
    if "openvino" in source.settings.formats:
        free.append(Free(OPENVINO, partial(open_compiled, float32, source.threads, source.images)))
    return free


def _candidates(source: Source, layers: dict[str, ExportLayer], progress: Progress) -> list[dict[str, FormChoice]]:
    """The forms to try: what was asked for, or else the fastest of each layer, and all dense for when that mix is slower."""
    settings = source.settings
    if settings.form != "auto" or source.precision in HALF:
        form = "dense" if settings.form == "auto" else settings.form
        return [{name: FormChoice(form if form in forms_of(layer) else "dense", {}) for name, layer in layers.items()}]
    chosen = choose_forms(layers, source.tokens(layers), source.threads, progress)
    return [chosen, {name: FormChoice("dense", choice.times_us) for name, choice in chosen.items()}]


def _over_dense(speed: ExportSpeed, precision: str) -> float:
    """How many times faster than the dense model in the same precision, where that was timed."""
    int8 = [form for form in speed.free if form.name == INT8 and precision.startswith("int8")]
    return (int8[0] if int8 else speed).speedup.value


def _open(path: Path, source: Source) -> Subject:
    return partial(session(path, source.threads).run, None, {"images": source.images.numpy()})


def _account(precision: str, layers: list[ExportedLayer], speed: ExportSpeed | None) -> dict[str, Any]:
    """How the file came about, for its metadata."""
    return {
        "precision": precision,
        "forms": {layer.name: layer.form for layer in layers},
        "times_us": {layer.name: layer.times_us for layer in layers if layer.times_us},
        "speedup_over_dense_float32": speed and dataclasses.asdict(speed.speedup),
        "best_free": speed and speed.best_free,
        "speedup_over_best_free": speed and speed.speedup_over_best_free and dataclasses.asdict(speed.speedup_over_best_free),
        "threads": speed and speed.threads,
        "batch_size": speed and speed.batch_size,
        "cpu": cpu_name(),
        "versions": {package: installed(package) for package in ("lpvit", "torch", "onnxruntime")},
    }


def _size(file: Path) -> int:
    """With its external data."""
    return sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*"))
