"""export to torch's own formats: a .pt2 program, and one compiled for this CPU; block-sparse layers where they are faster."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.export import ExportedProgram

from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.export.layer import Choice, Layer, choose_by_kind
from lpvit_cli.export.program import EXTRA_FILE, METADATA_KEY, TorchProgram
from lpvit_cli.export.pt2 import FORMS, as_module, export_program, plain
from lpvit_cli.measure.timing import Subject, cpu_threads, time_in_visits
from lpvit_cli.models import VisionModel
from lpvit_cli.report.schema import ExportedFile
from lpvit_cli.run import Progress
from lpvit_cli.sparse import sparse_layers
from lpvit_cli.stages.exporting import SAMPLES, VISITS, Source, check, describe, measure

FILE, COMPILED = "model.pt2", "model.aoti.pt2"


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
    file = work / name
    layers = {path: Layer(path, linear.weight, linear.bias) for path, linear in sparse_layers(source.model).items()}
    with cpu_threads(source.threads):
        choices = _choose(source, layers, progress)
        progress(f"exporting to {name}", 0, 1, "")
        model = plain(source.model, layers, {path: choice.form for path, choice in choices.items()})
        save(export_program(model), json.dumps(source.config))
        parity, result = check(TorchProgram(file), source, name, progress)

        def open_model(make: Callable[[], VisionModel]) -> Subject:
            return partial(make(), source.images)

        open_dense, open_file = partial(open_model, source.dense), partial(open_model, partial(TorchProgram, file))
        with torch.inference_mode():
            speed = measure(source, "eager torch", name, open_dense, open_file, progress)
    return ExportedFile(
        format=format_,
        file=name,
        bytes=file.stat().st_size,
        parity=parity,
        accuracy=result,
        layers=describe(layers, choices),
        speed=speed,
    )


def _choose(source: Source, layers: dict[str, Layer], progress: Progress) -> dict[str, Choice]:
    """export.form, or with auto the faster one in torch; dense where nothing is removed."""
    form = source.recipe.export.form
    if form not in ("auto", *FORMS):
        source.notes.append(f"torch's own formats have no form {form}: they were written as rows")

    def choose(layer: Layer, tokens: int) -> Choice:
        if layer.weight.density == 1 or form == "dense":
            return Choice("dense", {})
        if form != "auto":
            return Choice("rows", {})
        x = torch.randn(tokens, layer.weight.shape[1], generator=torch.Generator().manual_seed(0))

        def open_form(name: str) -> Subject:
            return partial(as_module(layer, name), x)

        opened: dict[str, Callable[[], Subject]] = {name: partial(open_form, name) for name in FORMS}
        with torch.inference_mode():
            return Choice.fastest(time_in_visits(opened, visits=VISITS, samples=SAMPLES, threads=source.threads))

    return choose_by_kind(layers, source.tokens(layers), progress, choose)


def require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise EnvironmentFault(
            "export.formats: aoti compiles the model, and there is no C++ compiler here",
            "install one (Debian, Ubuntu: apt install g++), or name yours in the environment variable CXX",
        ) from error
