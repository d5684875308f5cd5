"""A .pt2 file: a program of torch's own operators, block-sparse layers where they are faster."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from lpvit_cli.export.check import check, describe
from lpvit_cli.export.layer import ExportLayer, FormChoice, choose_by_kind
from lpvit_cli.export.program import FORMS, as_module, export_program, plain
from lpvit_cli.export.results import ExportedFile
from lpvit_cli.export.source import Source
from lpvit_cli.export.speed import SAMPLES, VISITS, Free, measure
from lpvit_cli.measure.timing import Subject, cpu_threads, time_in_visits
from lpvit_cli.progress import Progress
from lpvit_cli.sparse import sparse_layers
from lpvit_cli.targets.pt2 import TorchProgram

Save = Callable[[ExportedProgram, str], None]  # the program, and what goes into the file as metadata


def write_program(format_: str, name: str, save: Save, source: Source, work: Path, progress: Progress) -> ExportedFile:
    """Export the model, let `save` write it to `work / name`, check it, and time it against eager torch."""
    file = work / name
    layers = {path: ExportLayer(path, linear.weight, linear.bias) for path, linear in sparse_layers(source.model).items()}
    with cpu_threads(source.threads):
        choices = _choose(source, layers, progress)
        progress(f"exporting to {name}", 0, 1, "")
        model = plain(source.model, layers, {path: choice.form for path, choice in choices.items()})
        save(export_program(model), json.dumps(source.config))
        parity, result = check(TorchProgram(file), source, name)

        def open_model(make: Callable[[], nn.Module]) -> Subject:
            return partial(make(), source.images)

        free = [Free("dense float32 in eager torch", partial(open_model, source.dense))]
        with torch.inference_mode():
            speed = measure(source, name, partial(open_model, partial(TorchProgram, file)), free, progress)
    return ExportedFile(
        format=format_,
        file=name,
        bytes=file.stat().st_size,
        parity=parity,
        quality=result,
        layers=describe(layers, choices),
        speed=speed,
    )


def _choose(source: Source, layers: dict[str, ExportLayer], progress: Progress) -> dict[str, FormChoice]:
    """export.form, or with auto the faster one in torch; dense where nothing is removed."""
    form = source.settings.form
    if form not in ("auto", *FORMS):
        source.notes.append(f"torch's own formats have no form {form}: they were written as rows")

    def choose(layer: ExportLayer, tokens: int) -> FormChoice:
        if layer.weight.density == 1 or form == "dense":
            return FormChoice("dense", {})
        if form != "auto":
            return FormChoice("rows", {})
        x = torch.randn(tokens, layer.weight.shape[1], generator=torch.Generator().manual_seed(0))

        def open_form(name: str) -> Subject:
            return partial(as_module(layer, name), x)

        opened: dict[str, Callable[[], Subject]] = {name: partial(open_form, name) for name in FORMS}
        with torch.inference_mode():
            return FormChoice.fastest(time_in_visits(opened, visits=VISITS, samples=SAMPLES, threads=source.threads))

    return choose_by_kind(layers, source.tokens(layers), progress, choose)
