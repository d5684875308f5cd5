"""Reports as tables and sentences for the terminal. Plain strings are printed as they are: the console has markup off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

from lpvit_cli.report import schema
from lpvit_cli.report.terminal import bench, models, profile, pruning

RENDERERS: dict[type[schema.Report], Any] = {
    schema.CalibrateReport: pruning.calibrate,
    schema.PruneReport: pruning.prune,
    schema.SweepReport: pruning.sweep,
    schema.PredictionReport: pruning.prediction,
    schema.FinetuneReport: pruning.finetune,
    schema.GradualReport: pruning.gradual,
    schema.BenchReport: bench.bench_tables,
    schema.CompareReport: bench.compare_table,
    schema.ProfileReport: profile.profile,
    schema.ExportReport: models.export,
    schema.EvaluateReport: models.evaluate,
    schema.EmbedReport: models.embed,
    schema.PredictReport: models.predict,
    schema.TuneReport: models.tune,
}


def render(report: schema.Report, folder: Path) -> list[Any]:
    """What the terminal shows for a report whose artefact is in `folder`."""
    notes = [Text(f"note: {note}", "dim") for note in report.notes]
    return [*RENDERERS[type(report)](report, folder), *notes]
