"""export to torch's own formats: a .pt2 program, and one compiled for this CPU; block-sparse layers where they are faster."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.export import ExportedProgram

from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.export.layer import Choice, Layer, choose_by_kind
from lpvit_cli.export.program import EXTRA_FILE, METADATA_KEY, TorchProgram
from lpvit_cli.export.pt2 import FORMS, as_module, export_program, plain
from lpvit_cli.measure.timing import Subject, cpu_threads, time_in_visits, verdict
from lpvit_cli.models import VisionModel, build_model
from lpvit_cli.recipe import ExportSection, ModelSection
from lpvit_cli.report.schema import BASELINE, ExportedFile, ExportedLayer, ExportSpeed
from lpvit_cli.run import Progress
from lpvit_cli.sparse import sparse_layers
from lpvit_cli.stages.exporting import Source, check
from lpvit_cli.stages.tune import layer_tokens

FILE, COMPILED = "model.pt2", "model.aoti.pt2"
VISITS, SAMPLES = 3, 4


def write_pt2(source: Source, work: Path, progress: Progress) -> ExportedFile:
    """RUN/export/model.pt2: `torch.export.load(file).module()(images)` in plain torch."""

    def save(program: ExportedProgram, metadata: str) -> None:
        torch.export.save(program, work / FILE, extra_files={EXTRA_FILE: metadata})

    return _write("pt2", FILE, save, source, work, progress)


def write_aoti(source: Source, work: Path, progress: Progress) -> ExportedFile:
    """RUN/export/model.aoti.pt2: the same, compiled for CPUs like this one: `torch._inductor.aoti_load_package(file)(images)`.

    Compiling takes minutes for a large model. Raises EnvironmentFault without a C++ compiler.
    """

    def save(program: ExportedProgram, metadata: str) -> None:
        progress("compiling", 0, 1, "")
        # with threads fixed, the file would use as many as there are here
        settings = {"aot_inductor.metadata": {METADATA_KEY: metadata}, "cpp.dynamic_threads": True}
        torch._inductor.aoti_compile_and_package(program, package_path=str(work / COMPILED), inductor_configs=settings)

    source.notes.append(f"the speed of {COMPILED} is the compiler's merit too: the dense model runs uncompiled beside it")
    source.notes.append(f"{COMPILED} is machine code for this kind of CPU and this torch ({torch.__version__})")
    return _write("aoti", COMPILED, save, source, work, progress)


def _write(
    format_: str,
    name: str,
    save: Callable[[ExportedProgram, str], None],
    source: Source,
    work: Path,
    progress: Progress,
) -> ExportedFile:
    settings, file = source.recipe.export, work / name
    threads = settings.threads or os.cpu_count() or 1
    layers = {path: Layer(path, linear.weight, linear.bias) for path, linear in sparse_layers(source.model).items()}
    with cpu_threads(threads):
        choices = _choose(source, layers, threads, progress)
        progress(f"exporting to {name}", 0, 1, "")
        model = plain(source.model, layers, {path: choice.form for path, choice in choices.items()})
        save(export_program(model), json.dumps(source.config))
        parity, result = check(TorchProgram(file), source, name, progress)
        speed = _measure(file, source, settings, threads, progress)
    return ExportedFile(
        format=format_,
        file=name,
        bytes=file.stat().st_size,
        parity=parity,
        accuracy=result,
        layers=[
            ExportedLayer(
                name=path,
                shape=layer.weight.shape,
                block=layer.weight.block,
                density=layer.weight.density,
                form=choices[path].form,
                times_us=choices[path].times_us,
            )
            for path, layer in layers.items()
        ],
        speed=speed,
    )


def _choose(source: Source, layers: dict[str, Layer], threads: int, progress: Progress) -> dict[str, Choice]:
    """export.form: dense or, by any other name, rows; auto: the faster one in torch. Where nothing is removed, dense."""
    settings = source.recipe.export

    def choose(layer: Layer, tokens: int) -> Choice:
        if layer.weight.density == 1 or settings.form == "dense":
            return Choice("dense", {})
        if settings.form != "auto":
            return Choice("rows", {})
        x = torch.randn(tokens, layer.weight.shape[1], generator=torch.Generator().manual_seed(0))

        def open_form(form: str) -> Subject:
            return partial(as_module(layer, form), x)

        opened: dict[str, Callable[[], Subject]] = {form: partial(open_form, form) for form in FORMS}
        with torch.inference_mode():
            return Choice.fastest(time_in_visits(opened, visits=VISITS, samples=SAMPLES, threads=threads))

    tokens = {name: settings.batch_size * rows for name, rows in layer_tokens(source.model, layers).items()}
    return choose_by_kind(layers, tokens, progress, choose)


def _measure(file: Path, source: Source, settings: ExportSection, threads: int, progress: Progress) -> ExportSpeed:
    """The file and the dense model (random weights: it takes as long whatever it holds) in torch, in turn."""
    section = ModelSection(name=source.config["architecture"], kwargs=source.config["kwargs"])
    images = torch.randn(settings.batch_size, *source.model.pretrained_cfg["input_size"])

    def open_model(make: Callable[[], VisionModel]) -> Subject:
        return partial(make(), images)

    with torch.inference_mode():
        timing = time_in_visits(
            {
                BASELINE: partial(open_model, partial(build_model, section)),
                file.name: partial(open_model, partial(TorchProgram, file)),
            },
            visits=VISITS,
            samples=SAMPLES,
            threads=threads,
            on_visit=lambda done, total: progress("timing the file", done, total, f"{done}/{total}"),
        )
    ratio = timing.ratio(BASELINE, file.name)
    sentence = verdict(file.name, "dense float32 in eager torch", ratio, timing, timing.subjects[file.name])
    return ExportSpeed(threads=threads, batch_size=settings.batch_size, timing=timing, speedup=ratio, verdict=sentence)


def require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise EnvironmentFault(
            "export.formats: aoti compiles the model, and there is no C++ compiler here",
            "install one (Debian, Ubuntu: apt install g++), or name yours in the environment variable CXX",
        ) from error
