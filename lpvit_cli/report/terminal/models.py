"""What the terminal shows of exporting, evaluating, predicting and tuning."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lpvit_cli.export.results import ExportSpeed
from lpvit_cli.numbers import by, interval, percent, size, three_digits
from lpvit_cli.report.schema import EmbedReport, EvaluateReport, ExportReport, PredictReport, TuneReport
from lpvit_cli.report.terminal.cells import numbers, table


def export(report: ExportReport, folder: Path) -> list[Any]:
    shown: list[Any] = []
    for file in report.files:
        smaller = f" ({file.bytes / file.bytes_dense:.2f}x dense float32)" if file.bytes_dense else ""
        precision = f", {report.precision}" if file.format in ("onnx", "triton-server") else ""
        shown.append(Text(f"{folder / file.file}: {file.format}{precision}, {size(file.bytes)}{smaller}", "bold"))
        if file.speed:
            shown.append(f"{file.speed.verdict}; batch {file.speed.batch_size}, {file.speed.threads} threads")
            if len(file.speed.free) > 1:
                shown.append(_free(file.speed, report.quality_model.figures[0].name))
        if file.layers:
            counts = Counter(layer.form for layer in file.layers)
            shown.append("layers by form: " + ", ".join(f"{count} {form}" for form, count in counts.most_common()))
        if file.parity:
            same = "cosine" if file.parity[0].agreement is None else "same top-1"
            merges = file.parity[0].flipped is not None
            heads = ["images", "median error", same, "other tokens merged"] if merges else ["batch", "relative error", same]
            rows = table("against the model, on real images", *heads)
            for parity in file.parity:
                alike = f"{parity.cosine:.6f}" if parity.agreement is None else percent(parity.agreement)
                flipped = [] if parity.flipped is None else [percent(parity.flipped)]
                rows.add_row(str(parity.batch_size), f"{parity.relative_error:.1e}", alike, *flipped)
            shown.append(rows)
        if file.quality:
            now, before = file.quality.figures[0], report.quality_model.figures[0]
            shown.append(f"{now.name} {now.text} (model {before.text}) on {file.quality.images} images")
    return shown


def _free(speed: ExportSpeed, figure: str) -> Table:
    rows = numbers("the dense model, free forms", "", "ms", "the file's speed (95 %)", figure, "")
    for form in speed.free:
        quality = form.quality.figures[0].text if form.quality else "-"
        kind = "best" if form.name == speed.best_free else "" if form.counts else "loses too much"
        rows.add_row(form.name, three_digits(form.median_ms), interval(form.speedup), quality, kind)
    return rows


def evaluate(report: EvaluateReport, folder: Path) -> list[Any]:
    def named(figure: str) -> str:
        """As in runs, which compare with the dense model only."""
        return f"{figure.removesuffix('dense')}{report.reference}" if figure.endswith(" dense") else figure

    result = report.quality
    skipped = f", {report.skipped_images} unreadable images skipped" if report.skipped_images else ""
    fewer = report.available is not None and result.images + report.skipped_images < report.available
    where = f"{result.images}{f' of {report.available}' if fewer else ''} images of {report.dataset}"
    figures = ", ".join(f"{named(figure.name)} {figure.text}" for figure in result.figures)
    return [f"{report.model}: {figures} on {where}{skipped}"]


def embed(report: EmbedReport, folder: Path) -> list[Any]:
    skipped = f"; {report.skipped_images} unreadable images skipped" if report.skipped_images else ""
    names = f", their names in {report.names}" if report.names else ""
    shape = " x ".join(str(size) for size in report.shape)
    speed = f"{report.images_per_second:.0f} images/s"
    return [f"{report.output}: embeddings [{shape}] float32 of {report.shape[0]} images{names}; {speed}{skipped}"]


def predict(report: PredictReport, folder: Path) -> list[Any]:
    shown = []
    for prediction in report.predictions:
        rows = table(prediction.image, "class", "index", "probability")
        names = prediction.names or ["" for _ in prediction.classes]
        for name, index, probability in zip(names, prediction.classes, prediction.probabilities, strict=True):
            rows.add_row(name, str(index), percent(probability))
        shown.append(rows)
    return shown


PASSES = {"forward": "forward", "input_gradient": "dx", "weight_gradient": "dW"}


def tune(report: TuneReport, folder: Path) -> list[Any]:
    kinds = len({one.kind for one in report.tuned}) > 1
    columns = ("kept", "tokens", *(["pass"] * kinds), "fastest", "x dense", "GFLOP/s")
    rows = numbers(f"fastest on {report.device}, {report.dtype}; GFLOP/s on kept blocks", "layer", *columns)
    for one in report.tuned:
        more = f" +{len(one.layers) - 1}" if len(one.layers) > 1 else ""
        rows.add_row(
            f"{one.layers[0]}{more}\n{by(one.shape)} in {by(one.block)}",
            f"{100 * one.density:.0f} %",
            str(one.tokens),
            *([PASSES[one.kind]] * kinds),
            one.choice,
            "-" if one.speedup is None else f"{one.speedup:.2f}",
            f"{1e3 * one.kept_tflops:.0f}",
        )
    forward = [one for one in report.tuned if one.kind == "forward" and one.density < 1]
    dense = sum(one.choice == "dense" for one in forward)
    told = f"dense is the fastest forward for {dense} of {len(forward)} with removed blocks: lpvit runs those as dense layers"
    return [rows, *([told] if forward else [])]
