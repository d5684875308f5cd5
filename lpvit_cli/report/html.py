"""report.html: one self-contained page with the verdict first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2

from lpvit_cli.bench.notes import verdicts
from lpvit_cli.bench.results import BatchBench
from lpvit_cli.measure.energy.run import SENSORS_ERR
from lpvit_cli.numbers import by, interval, percent, three_digits
from lpvit_cli.recipe.measure import OF_MERGING
from lpvit_cli.report.pictures import (
    blocks_picture,
    energy_picture,
    latency_picture,
    layers_picture,
    merging_picture,
    patches_picture,
    power_picture,
)
from lpvit_cli.report.schema import BenchReport, FinetuneReport, PruneReport

MERGED = "What merging tokens, removing weights, and both take and lose, before recovery. Up and left is better."
PATCHES = "Images above, and below what the last block sees: patches that are one token have the colour of their mean."
KEPT = "Kept blocks of every layer: a cell is a block, output features down, input features across, dark where it is kept."


def write_html(
    path: Path,
    recipe: str,
    bench: BenchReport,
    pruned: PruneReport,
    finetuned: FinetuneReport | None,
    photos: Sequence[tuple[Any, Any]] = (),
) -> None:
    """Without matplotlib the page has its tables and says how to get the pictures. `photos`: images beside their tokens."""
    pictures: list[tuple[str, str]] = []  # caption, SVG
    if find_spec("matplotlib"):
        pictures = [picture for batch in bench.batches for picture in _of_batch(batch)]
        if pruned.merged:
            timed = [batch for batch in bench.batches if OF_MERGING[0] in batch.timing.subjects]
            pictures += [(MERGED, merging_picture(batch, pruned)) for batch in timed]
            pictures += [(PATCHES, patches_picture(photos))] if photos else []
        pictures.append((KEPT, blocks_picture(pruned.layers)))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"interval": interval, "percent": percent, "digits": three_digits, "by": by}
    page = environment.get_template("report.html.jinja").render(
        sensors_err=SENSORS_ERR,
        recipe=recipe,
        bench=bench,
        verdicts=verdicts(bench.batches),
        pruned=pruned,
        finetuned=finetuned,
        pictures=pictures,
    )
    path.write_text(page, encoding="utf-8")


def _of_batch(batch: BatchBench) -> Iterator[tuple[str, str]]:
    yield f"How many calls took at most so long, {batch.title}. Left is faster.", latency_picture(batch)
    if batch.energy and batch.energy.subjects:
        if any(subject.windows for subject in batch.energy.subjects.values()):
            yield f"Power while energy was measured, {batch.title}.", power_picture(batch, batch.energy)
        yield f"Energy of an image with 95 % intervals, {batch.title}. Shorter is better.", energy_picture(batch, batch.energy)
    if batch.layers:
        yield f"Where the time goes, {batch.title}.", layers_picture(batch, batch.layers)
