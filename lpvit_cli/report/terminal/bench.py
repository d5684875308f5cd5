"""What the terminal shows of a bench and of two benches compared: the verdicts first."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from rich.text import Text

from lpvit_cli.bench.notes import verdicts
from lpvit_cli.bench.results import BatchBench
from lpvit_cli.measure.energy.run import SENSORS_ERR
from lpvit_cli.measure.timing import Timing
from lpvit_cli.numbers import interval, three_digits
from lpvit_cli.report.schema import BenchReport, CompareReport
from lpvit_cli.report.terminal.cells import numbers

PERCENTILES = ("p50", "p90", "p99")


def bench_tables(report: BenchReport, folder: Path) -> list[Any]:
    first, *others = [*verdicts(report.batches), *filter(None, (batch.energy_verdict for batch in report.batches))]
    energy = _energy(report) + [f"energy   not measured: {reason}" for reason in report.energy_reasons]
    layers = [shown for batch in report.batches for shown in _layers(batch)]
    return [Text(first, "bold"), *others, *_latency(report), *energy, *layers, f"report: {folder / 'report.html'}"]


def _latency(report: BenchReport) -> list[Any]:
    """report.csv and report.html have more columns than fit beside a name in 80."""
    made = []
    for dtype in report.dtypes:
        rows = numbers(f"{report.model} on {report.device}, {dtype}", "ms", *PERCENTILES, "img/s", "MiB", "speed-up (95 %)")
        for batch in report.batches:
            if batch.dtype == dtype:
                rows.add_row(Text(f"batch {batch.batch_size}", "bold"))
                for name, timing in batch.timing.subjects.items():
                    ratio, memory = batch.speedup.get(name), batch.peak_memory_bytes[name]
                    rows.add_row(
                        name,
                        *(_percentile(timing, which) for which in PERCENTILES),
                        three_digits(batch.images_per_second[name]),
                        _or_dash(memory and memory / 2**20, ".0f"),
                        interval(ratio) if ratio else "1",
                    )
        made.append(rows)
    return made


def _percentile(timing: Timing, which: str) -> str:
    return three_digits(getattr(timing.percentiles, which)) if timing.percentiles else "-"


def _energy(report: BenchReport) -> list[Any]:
    """report.csv and report.html have more columns than fit beside a name in 80."""
    measured = [(batch, batch.energy) for batch in report.batches if batch.energy and batch.energy.subjects]
    if not measured:
        return []
    rows = numbers(f"energy by {measured[0][1].source}", "", "J/image", "above idle", "W", "peak W", "saving (95 %)")
    for batch, run in measured:
        rows.add_row(Text(batch.title, "bold"))
        for name, energy in run.subjects.items():
            rows.add_row(
                name,
                f"{energy.joules_per_image:.4g}",
                f"{energy.above_idle_joules_per_image:.4g}",
                f"{energy.average_w:.0f}",
                _or_dash(energy.peak_w, ".0f"),
                interval(run.ratio(batch.baseline, name)) if name != batch.baseline else "1",
            )
    notes = dict.fromkeys([*(note for _, run in measured for note in run.notes), SENSORS_ERR])
    return [rows, *(f"energy   {note}" for note in notes)]


def _or_dash(value: float | None, format_: str) -> str:
    return "-" if value is None else format(value, format_)


def _layers(batch: BatchBench) -> list[Any]:
    if batch.layers is None:
        return []
    bench = batch.layers
    columns = (batch.title, "kept", "runs", "dense ms", "ms", "share", "TFLOP/s", "roofline")
    rows = numbers("layers; TFLOP/s of kept blocks; roofline: the least time over the measured one", *columns)
    for layer in bench.layers:
        rows.add_row(
            layer.name,
            f"{layer.density:.0%}",
            layer.runs,
            three_digits(layer.ms_dense),
            three_digits(layer.ms),
            f"{layer.share:.1%}",
            f"{layer.tflops:.3g}",
            f"{layer.roofline:.0%}",
        )
    rows.add_row("all else", "", "", three_digits(bench.rest_ms_dense), three_digits(bench.rest_ms), f"{bench.rest_share:.1%}")
    reached = f"{bench.peak_tflops:.3g} TFLOP/s in a large product, {bench.bandwidth_gb_s:.0f} GB/s in a large copy"
    return [
        rows,
        f"the device reached {reached}; a fused layer's time holds GELU, LayerScale and residual, a dense one's does not",
    ]


def compare_table(report: CompareReport, folder: Path) -> list[Any]:
    rows = numbers("before over after: above 1 is better", "", "", "before", "after", "ratio (95 %)")
    for (batch_size, dtype), changes in groupby(report.changes, key=lambda change: (change.batch_size, change.dtype)):
        rows.add_row(Text(f"batch {batch_size}, {dtype}", "bold"))
        for change in changes:
            rows.add_row(
                Text(change.subject, "bold red" if change.worse else ""),
                change.what,
                f"{change.before:.4g}",
                f"{change.after:.4g}",
                interval(change.ratio),
            )
    return [Text(report.verdict, "bold"), rows, *(f"differs: {difference}" for difference in report.differences)]
