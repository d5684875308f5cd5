"""What the terminal shows of calibrating, pruning and recovering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpvit_cli.numbers import giga, interval, percent, size
from lpvit_cli.report.schema import (
    CalibrateReport,
    FinetuneReport,
    GradualReport,
    PredictionReport,
    PruneReport,
    SweepReport,
)
from lpvit_cli.report.terminal.cells import table


def calibrate(report: CalibrateReport, folder: Path) -> list[Any]:
    return [
        f"calibrated {report.layers} layers on {report.images} images (gradient: {report.gradient}), "
        f"{size(report.statistics_bytes)} of statistics in {folder}"
    ]


def prune(report: PruneReport, folder: Path) -> list[Any]:
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
    energy, energy_whole = (sum(getattr(layer, k) for layer in report.layers) for k in ("energy_uj", "energy_uj_dense"))
    energy_dense = report.energy_uj_dense or energy_whole
    merged = report.merged
    summary = table("", "", "dense", *(["tokens merged"] if merged else []), "pruned", "ratio")

    def row(name: str, dense: str, pruned: str, ratio: str, of_merged: str = "") -> None:
        summary.add_row(name, dense, *([of_merged] if merged else []), pruned, ratio)

    of_merged = giga(merged.flops) if merged else ""
    row("FLOPs", giga(report.flops_dense), giga(report.flops), f"{report.flops / report.flops_dense:.2f}", of_merged)
    row("prunable weights kept", "100 %", percent(report.linear_kept_fraction), f"{report.linear_kept_fraction:.2f}")
    if energy_dense:
        row("predicted uJ/image", f"{energy_dense:.0f}", f"{energy:.0f}", f"{energy / energy_dense:.2f}", f"{energy_whole:.0f}")
    if report.latency_ms is not None and report.latency_ms_dense is not None:
        dense_ms, ms = report.latency_ms_dense, report.latency_ms
        row("predicted ms/batch", f"{dense_ms:.2f}", f"{ms:.2f}", f"{ms / dense_ms:.2f}")
    row("size on disk", size(report.bytes_dense), size(report.bytes), f"{report.bytes / report.bytes_dense:.2f}")
    between = {figure.name: figure.text for figure in merged.quality.figures} if merged else {}
    for dense, pruned in zip(report.quality_dense.figures, report.quality.figures, strict=True):
        name = dense.name
        row(f"{name}, one-shot", dense.text, pruned.text, pruned.minus(dense), between.get(name, ""))
    if merged:
        row(
            "tokens of the last block",
            f"{merged.tokens[0]}",
            f"{merged.tokens[-1]}",
            f"{merged.tokens[-1] / merged.tokens[0]:.2f}",
        )
    return [rows, summary, f"model folder: {folder}"]


def sweep(report: SweepReport, folder: Path) -> list[Any]:
    first = report.points[0].report
    title = f"one-shot, by {first.method}; speed at batch {report.batch_size}: dense {report.latency_ms_dense:.2f} ms"
    columns = [report.kind, "weights", "FLOPs", "size", first.quality.figures[0].name, "- dense", "speed-up (95 %)"]
    rows = table(title, *columns, *(["predicted"] if first.latency_ms is not None else []))
    dense = first.quality_dense.figures[0]
    rows.add_row("dense", "1.00", "1.00", "1.00", dense.text, "", "1")
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
            made.quality.figures[0].text,
            made.quality.figures[0].minus(dense),
            interval(point.speedup),
            *predicted,
        )
    return [rows, f"model folders and picture (sweep.svg): {folder}"]


def prediction(report: PredictionReport, folder: Path) -> list[Any]:
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


def finetune(report: FinetuneReport, folder: Path) -> list[Any]:
    how = {"lora_ga": "masked LoRA-GA", "lora": "masked LoRA", "full": "training all kept blocks"}[report.method]
    rows = table(f"recovered by {how}", "", "dense", "pruned", "recovered", "recovered - dense")
    qualities = (report.quality_dense, report.quality_pruned, report.quality)
    for dense, pruned, recovered in zip(*(quality.figures for quality in qualities), strict=True):
        rows.add_row(dense.name, dense.text, pruned.text, recovered.text, recovered.minus(dense))
    rank = "" if report.rank is None else f" (rank {report.rank})"
    trained = f"{report.trainable_parameters:,} parameters trained{rank}, {report.all_parameters:,} in the model"
    epochs = f"{len(report.history)} epoch{'s' * (len(report.history) != 1)}, the best is {report.best_epoch}"
    return [rows, f"{epochs}; {trained}; zero blocks checked", f"model folder: {folder}"]


def gradual(report: GradualReport, folder: Path) -> list[Any]:
    rows = table("pruned and recovered in turns", report.kind, "weights", "FLOPs", "size", "pruned", "recovered", "- dense")
    dense = report.steps[0].pruned.quality_dense.figures[0]
    rows.add_row("dense", "1.00", "1.00", "1.00", "", dense.text, "")
    for step in report.steps:
        made = step.pruned
        rows.add_row(
            f"{step.budget:g}",
            f"{made.linear_kept_fraction:.2f}",
            f"{made.flops / made.flops_dense:.2f}",
            f"{made.bytes / made.bytes_dense:.2f}",
            made.quality.figures[0].text,
            step.recovered.quality.figures[0].text,
            step.recovered.quality.figures[0].minus(dense),
        )
    return [rows, f"model folder, earlier ones and picture (gradual.svg): {folder}"]
