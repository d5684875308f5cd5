"""Reports as tables and sentences for the terminal. Plain strings are printed as they are: the console has markup off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lpvit_cli.measure.power import Estimate
from lpvit_cli.measure.profile import KEPT, DeviceProfile, LayerProfile, SparseProfile
from lpvit_cli.report.bench_tables import bench_tables, compare_table
from lpvit_cli.report.cells import by, giga, interval, percent, size, table, three_digits
from lpvit_cli.report.schema import (
    BenchReport,
    CalibrateReport,
    CompareReport,
    EvaluateReport,
    ExportReport,
    FinetuneReport,
    GradualReport,
    PredictionReport,
    PredictReport,
    ProfileReport,
    PruneReport,
    Report,
    SweepReport,
    TuneReport,
)


def render(report: Report, folder: Path) -> list[Any]:
    """What the terminal shows for a report whose artefact is in `folder`."""
    renderers: dict[type[Report], Any] = {
        CalibrateReport: _calibrate,
        PruneReport: _prune,
        SweepReport: _sweep,
        PredictionReport: _prediction,
        FinetuneReport: _finetune,
        GradualReport: _gradual,
        BenchReport: bench_tables,
        CompareReport: compare_table,
        ProfileReport: _profile,
        ExportReport: _export,
        EvaluateReport: _evaluate,
        PredictReport: _predict,
        TuneReport: _tune,
    }
    notes = [Text(f"note: {note}", "dim") for note in report.notes]
    return [*renderers[type(report)](report, folder), *notes]


def summary(recipe: str, reports: dict[str, Any], folder: Path) -> Text:
    """One paragraph on what a run came to; `reports` by command, as `lpvit run` collects them."""
    gradual: GradualReport | None = reports.get("gradual")
    pruned: PruneReport = gradual.steps[-1].pruned if gradual else reports["prune"]
    last = gradual.steps[-1].recovered if gradual else reports.get("finetune-lora-ga", pruned)
    bench: BenchReport = reports["bench"]
    speed = ", ".join(
        f"{batch.speedup[batch.subject].value:.2f}x at batch {batch.batch_size}"
        + f" in {batch.dtype}" * (len(bench.dtypes) > 1)
        for batch in bench.batches
    )
    dense, now = pruned.accuracy_dense.top1, last.accuracy.top1
    return Text.assemble(
        (recipe, "bold"),
        f": top-1 {now:.2f} % (dense {dense:.2f} %), {pruned.flops / pruned.flops_dense:.2f}x the FLOPs, "
        f"{pruned.bytes / pruned.bytes_dense:.2f}x the size, speed {speed}\n",
        f"model: {folder / bench.model}   report: {folder / 'bench' / 'report.html'}",
    )


def _calibrate(report: CalibrateReport, folder: Path) -> list[Any]:
    return [
        f"calibrated {report.layers} layers on {report.images} images (gradient: {report.gradient}), "
        f"{size(report.statistics_bytes)} of statistics in {folder}"
    ]


def _prune(report: PruneReport, folder: Path) -> list[Any]:
    blocks = " ".join(sorted({f"{rows}x{columns}" for rows, columns in (layer.block for layer in report.layers)}))
    title = f"pruned by {report.method}, blocks of {blocks} (out x in)"
    rows = table(title, "layer", "blocks", "kept", "distortion", "FLOPs", "predicted uJ")
    for layer in report.layers:
        rows.add_row(
            layer.name,
            f"{layer.kept_blocks}/{layer.blocks}",
            percent(layer.kept_fraction),
            f"{layer.distortion:.2g}",
            giga(layer.flops),
            f"{layer.energy_uj:.1f}",
        )
    energy, energy_dense = (sum(getattr(layer, k) for layer in report.layers) for k in ("energy_uj", "energy_uj_dense"))
    summary = table("", "", "dense", "pruned", "ratio")
    summary.add_row("FLOPs", giga(report.flops_dense), giga(report.flops), f"{report.flops / report.flops_dense:.2f}")
    summary.add_row(
        "prunable weights kept", "100 %", percent(report.linear_kept_fraction), f"{report.linear_kept_fraction:.2f}"
    )
    if energy_dense:
        summary.add_row("predicted uJ/image", f"{energy_dense:.0f}", f"{energy:.0f}", f"{energy / energy_dense:.2f}")
    if report.latency_ms is not None and report.latency_ms_dense is not None:
        dense_ms, ms = report.latency_ms_dense, report.latency_ms
        summary.add_row("predicted ms/batch", f"{dense_ms:.2f}", f"{ms:.2f}", f"{ms / dense_ms:.2f}")
    summary.add_row("size on disk", size(report.bytes_dense), size(report.bytes), f"{report.bytes / report.bytes_dense:.2f}")
    dense, pruned = report.accuracy_dense, report.accuracy
    change = f"{pruned.top1 - dense.top1:+.2f}"
    summary.add_row("top-1, one-shot", f"{dense.top1:.2f} %", f"{pruned.top1:.2f} %", change)
    return [rows, summary, f"model folder: {folder}"]


def _sweep(report: SweepReport, folder: Path) -> list[Any]:
    first = report.points[0].report
    title = f"one-shot, by {first.method}; speed at batch {report.batch_size}: dense {report.latency_ms_dense:.2f} ms"
    columns = [report.kind, "weights", "FLOPs", "size", "top-1", "- dense", "speed-up (95 %)"]
    rows = table(title, *columns, *(["predicted"] if first.latency_ms is not None else []))
    rows.add_row("dense", "1.00", "1.00", "1.00", f"{first.accuracy_dense.top1:.2f} %", "", "1")
    for point in report.points:
        made = point.report
        predicted = []
        if made.latency_ms is not None and made.latency_ms_dense is not None:
            predicted.append(f"{made.latency_ms_dense / made.latency_ms:.2f}")
        rows.add_row(
            f"{point.budget:g}",
            f"{made.linear_kept_fraction:.2f}",
            f"{made.flops / made.flops_dense:.2f}",
            f"{made.bytes / made.bytes_dense:.2f}",
            f"{made.accuracy.top1:.2f} %",
            f"{made.accuracy.top1 - made.accuracy_dense.top1:+.2f}",
            interval(point.speedup),
            *predicted,
        )
    return [rows, f"model folders and picture (sweep.svg): {folder}"]


def _prediction(report: PredictionReport, folder: Path) -> list[Any]:
    shown: list[Any] = []
    if report.points:
        rows = table("predicted, nothing pruned", report.kind, "weights", "FLOPs", "size", "uJ/image", "ms", "speed-up")
        dense_ms = f"{report.latency_ms_dense:.2f}" if report.latency_ms_dense else "-"
        dense_uj = f"{report.energy_uj_dense:.0f}"
        rows.add_row("dense", "1.00", giga(report.flops_dense), size(report.bytes_dense), dense_uj, dense_ms, "")
        for point in report.points:
            speedup = report.latency_ms_dense / point.latency_ms if point.latency_ms and report.latency_ms_dense else None
            rows.add_row(
                f"{point.budget:g}",
                f"{point.kept_fraction:.2f}",
                f"{giga(point.flops)}",
                size(point.bytes),
                f"{point.energy_uj:.0f}",
                f"{point.latency_ms:.2f}" if point.latency_ms else "-",
                f"{speedup:.2f}x" if speedup else "-",
            )
        shown.append(rows)
    return [*shown, *(f"not predicted   {reason}" for reason in report.reasons)]


def _finetune(report: FinetuneReport, folder: Path) -> list[Any]:
    how = {"lora_ga": "masked LoRA-GA", "lora": "masked LoRA", "full": "training all kept blocks"}[report.method]
    rows = table(f"recovered by {how}", "", "dense", "pruned", "recovered", "recovered - dense")
    for name in ("top1", "top5"):
        dense, pruned, recovered = (getattr(a, name) for a in (report.accuracy_dense, report.accuracy_pruned, report.accuracy))
        label = "top-1" if name == "top1" else "top-5"
        rows.add_row(label, f"{dense:.2f} %", f"{pruned:.2f} %", f"{recovered:.2f} %", f"{recovered - dense:+.2f}")
    rank = "" if report.rank is None else f" (rank {report.rank})"
    trained = f"{report.trainable_parameters:,} parameters trained{rank}, {report.all_parameters:,} in the model"
    epochs = f"{len(report.history)} epoch{'s' * (len(report.history) != 1)}, the best is {report.best_epoch}"
    return [rows, f"{epochs}; {trained}; zero blocks checked", f"model folder: {folder}"]


def _gradual(report: GradualReport, folder: Path) -> list[Any]:
    rows = table("pruned and recovered in turns", report.kind, "weights", "FLOPs", "size", "pruned", "recovered", "- dense")
    dense = report.steps[0].pruned.accuracy_dense.top1
    rows.add_row("dense", "1.00", "1.00", "1.00", "", f"{dense:.2f} %", "")
    for step in report.steps:
        made = step.pruned
        rows.add_row(
            f"{step.budget:g}",
            f"{made.linear_kept_fraction:.2f}",
            f"{made.flops / made.flops_dense:.2f}",
            f"{made.bytes / made.bytes_dense:.2f}",
            f"{made.accuracy.top1:.2f} %",
            f"{step.recovered.accuracy.top1:.2f} %",
            f"{step.recovered.accuracy.top1 - dense:+.2f}",
        )
    return [rows, f"model folder, earlier ones and picture (gradual.svg): {folder}"]


def _profile(report: ProfileReport, folder: Path) -> list[Any]:
    profile = report.profile
    whole = f"whole model {three_digits(profile.model_ms)} ms, {three_digits(profile.rest_ms)} ms outside these layers"
    shown: list[Any] = [
        Text(f"{profile.model} on {profile.device}, {profile.dtype}, batch {profile.batch_size}: {whole}", "bold"),
        _curves("ms per call, times faster than dense; by blocks kept (to the nearest block)", profile, "ms"),
        *(_break_even(layer, sparse) for layer in profile.layers for sparse in layer.sparse),
    ]
    if profile.model_mj is not None and profile.rest_mj is not None:
        whole = f"{three_digits(profile.model_mj)} mJ, {three_digits(profile.rest_mj)} mJ outside these layers"
        shown.append(f"energy by {profile.energy_source}: whole model {whole}")
        shown.append(_curves("mJ per call, times less than dense; by blocks kept (to the nearest block)", profile, "mj"))
    reasons = [f"energy   not measured: {reason}" for reason in profile.energy_reasons]
    return [*shown, *reasons, f"profile: {folder / 'profile.json'}"]


def power_lines(profile: DeviceProfile) -> list[str]:
    """The power model of a profile, and what it makes of the model."""
    power = profile.power
    if power is None or profile.model_mj is None or profile.rest_mj is None:
        return []
    terms = (("multiply-add", power.e_mac_pj, "pJ"), ("byte moved", power.e_byte_pj, "pJ"), ("static", power.static_w, "W"))
    return [
        f"energy by {profile.energy_source}",
        *(f"  {what:<12} {_estimate(found, unit)}" for what, found, unit in terms),
        f"  error of the fit {power.median_error:.1%} (median), {power.largest_error:.1%} at most; by it the whole model takes "
        f"{three_digits(profile.model_mj)} mJ, {three_digits(profile.rest_mj)} mJ outside these layers",
    ]


def _estimate(found: Estimate, unit: str) -> str:
    value, low, high = (three_digits(number) for number in (found.value, found.low, found.high))
    return f"{value} {unit} (95 % interval {low} to {high})"


def _curves(title: str, profile: DeviceProfile, unit: str) -> Table:
    """A row for each shape and block; each measured fraction in the column it is nearest to (few blocks leave some empty)."""
    rows = table(title, "out x in", "dense", *(f"{100 * kept:.0f} %" for kept in KEPT))
    for layer in profile.layers:
        for sparse in layer.sparse:
            dense = getattr(layer, f"dense_{unit}")
            cells = dict.fromkeys(KEPT, "")
            for kept, cost in zip(sparse.kept, getattr(sparse, unit), strict=True):
                nearest = min(KEPT, key=lambda column: abs(column - kept))
                cells[nearest] = f"{three_digits(cost)}\n{dense / cost:.2f}x"
            label = f"{len(layer.names)} of {by(layer.shape)}\n{layer.rows} rows, blocks {by(sparse.block)}"
            rows.add_row(label, three_digits(dense), *cells.values())
    return rows


def _break_even(layer: LayerProfile, sparse: SparseProfile) -> str:
    kept = sparse.break_even(layer.dense_ms)
    if kept is None:
        pays = f"never pays, not even with {100 * sparse.kept[0]:.0f} % kept"
    elif kept == 1:
        pays = "pays even with all blocks kept"
    else:
        pays = f"pays below {100 * kept:.0f} % kept"
    return f"{by(layer.shape)} on {layer.rows} rows, blocks {by(sparse.block)}: sparse {pays}"


def _export(report: ExportReport, folder: Path) -> list[Any]:
    shown: list[Any] = []
    for file in report.files:
        smaller = f" ({file.bytes / file.bytes_dense:.2f}x dense float32)" if file.bytes_dense else ""
        precision = f", {report.precision}" if file.format in ("onnx", "triton-server") else ""
        shown.append(Text(f"{folder / file.file}: {file.format}{precision}, {size(file.bytes)}{smaller}", "bold"))
        if file.speed:
            shown.append(f"{file.speed.verdict}; batch {file.speed.batch_size}, {file.speed.threads} threads")
        if file.layers:
            counts = Counter(layer.form for layer in file.layers)
            shown.append("layers by form: " + ", ".join(f"{count} {form}" for form, count in counts.most_common()))
        if file.parity:
            rows = table("against the model, on real images", "batch", "relative error", "same top-1")
            for parity in file.parity:
                rows.add_row(str(parity.batch_size), f"{parity.relative_error:.1e}", percent(parity.agreement))
            shown.append(rows)
        if file.accuracy:
            before = report.accuracy_model.top1
            shown.append(f"top-1 {file.accuracy.top1:.2f} % (model {before:.2f} %) on {file.accuracy.images} images")
    return shown


def _evaluate(report: EvaluateReport, folder: Path) -> list[Any]:
    result = report.accuracy
    skipped = f", {report.skipped_images} unreadable images skipped" if report.skipped_images else ""
    where = f"{result.images} images of {report.dataset}"
    return [f"{report.model}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % on {where}{skipped}"]


def _predict(report: PredictReport, folder: Path) -> list[Any]:
    shown = []
    for prediction in report.predictions:
        rows = table(prediction.image, "class", "index", "probability")
        names = prediction.names or ["" for _ in prediction.classes]
        for name, index, probability in zip(names, prediction.classes, prediction.probabilities, strict=True):
            rows.add_row(name, str(index), percent(probability))
        shown.append(rows)
    return shown


PASSES = {"forward": "forward", "input_gradient": "dx", "weight_gradient": "dW"}


def _tune(report: TuneReport, folder: Path) -> list[Any]:
    kinds = len({one.kind for one in report.tuned}) > 1
    columns = ("kept", "tokens", *(["pass"] * kinds), "fastest", "x dense", "GFLOP/s")
    rows = table(f"fastest on {report.device}, {report.dtype}; GFLOP/s on kept blocks", "layer", *columns)
    rows.columns[0].overflow = "fold"
    for column in rows.columns[1:]:
        column.no_wrap = True
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


def findings_table(findings: Iterable[Any]) -> Table:
    rows = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        mark = Text("ok", "green") if finding.ok else Text("--", "yellow")
        remedy = f"\n{finding.remedy}" if finding.remedy and not finding.ok else ""
        rows.add_row(mark, finding.what, Text.assemble(finding.detail, (remedy, "dim")))
    return rows


def recipes_table(paths: Iterable[Path]) -> Table:
    """Name and the first sentence of the comment that opens each recipe."""
    rows = Table(box=None, pad_edge=False, show_header=False)
    for path in paths:
        comments = [line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#")]
        about = " ".join(line for line in comments[1:] if line).split(". ")[0].rstrip(".")
        rows.add_row(Text(path.stem, "bold"), about)
    return rows
