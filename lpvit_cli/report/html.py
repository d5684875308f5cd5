"""report.html: one self-contained page with the verdict first."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import jinja2

from lpvit_cli.report.pictures import blocks_picture, latency_picture
from lpvit_cli.report.schema import BASELINE, BenchReport, FinetuneReport, PruneReport
from lpvit_cli.report.tables import interval


def write_html(path: Path, recipe: str, bench: BenchReport, pruned: PruneReport, finetuned: FinetuneReport | None) -> None:
    """Without matplotlib the page has its tables and says how to get the pictures."""
    pictures: list[tuple[str, str]] = []  # caption, SVG
    if find_spec("matplotlib"):
        pictures = [
            (f"How many calls took at most so long, batch {batch.batch_size}. Left is faster.", latency_picture(batch))
            for batch in bench.batches
        ]
        kept = (
            "Kept blocks of every layer: a cell is a block, output features down, input features across, dark where it is kept."
        )
        pictures.append((kept, blocks_picture(pruned.layers)))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        recipe=recipe, bench=bench, pruned=pruned, finetuned=finetuned, pictures=pictures, interval=interval, baseline=BASELINE
    )
    path.write_text(page, encoding="utf-8")
