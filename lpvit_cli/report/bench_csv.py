"""report.csv: a row for every subject of every batch of a bench, for spreadsheets. An empty cell was not measured.

Percentiles are of single calls; `-` where the calls are too short to know them.
"""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path
from typing import Any

from lpvit_cli.bench.results import BatchBench
from lpvit_cli.measure.statistics import Percentiles
from lpvit_cli.report.schema import BenchReport


def write_csv(path: Path, report: BenchReport) -> None:
    rows = [_row(batch, name) for batch in report.batches for name in batch.timing.subjects]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def _row(batch: BatchBench, name: str) -> dict[str, Any]:
    timed = batch.timing.subjects[name]
    energy = batch.energy.subjects.get(name) if batch.energy else None
    saving = batch.energy.ratio(batch.baseline, name) if batch.energy and energy and name != batch.baseline else None
    speedup = batch.speedup.get(name)
    return {
        "dtype": batch.dtype,
        "batch_size": batch.batch_size,
        "subject": name,
        "baseline": batch.baseline,
        **{f"{field.name}_ms": getattr(timed.percentiles, field.name, "-") for field in fields(Percentiles)},
        "median_ms": timed.median_ms,
        "mean_ms": timed.mean_ms,
        "variation": timed.variation,
        "unstable": timed.unstable,
        "host_bound": timed.host_bound,
        "cpu_time_ms": timed.cpu_time_ms,
        "foreign_load": batch.timing.foreign_load,
        "images_per_second": batch.images_per_second[name],
        "speedup": speedup and speedup.value,
        "speedup_low": speedup and speedup.low,
        "speedup_high": speedup and speedup.high,
        "peak_memory_bytes": batch.peak_memory_bytes[name],
        "joules_per_image": energy and energy.joules_per_image,
        "images_per_joule": energy and energy.images_per_joule,
        "above_idle_joules_per_image": energy and energy.above_idle_joules_per_image,
        "average_w": energy and energy.average_w,
        "peak_w": energy and energy.peak_w,
        "energy_delay_js": energy and energy.energy_delay_js,
        "saving": saving and saving.value,
        "saving_low": saving and saving.low,
        "saving_high": saving and saving.high,
    }
