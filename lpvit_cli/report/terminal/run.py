"""What a whole run came to, in one paragraph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

from lpvit_cli.report.schema import BenchReport, GradualReport, PruneReport


def summary(recipe: str, reports: dict[str, Any], folder: Path) -> Text:
    """One paragraph on what a run came to; `reports` by command, as `lpvit run` collects them."""
    gradual: GradualReport | None = reports.get("gradual")
    pruned: PruneReport = gradual.steps[-1].pruned if gradual else reports["prune"]
    last = gradual.steps[-1].recovered if gradual else reports.get("finetune-lora-ga", pruned)
    bench: BenchReport = reports["bench"]
    dense: Any = pruned.quality_dense
    speed = ", ".join(
        f"{batch.speedup[batch.subject].value:.2f}x at batch {batch.batch_size}"
        + f" in {batch.dtype}" * (len(bench.dtypes) > 1)
        for batch in bench.batches
    )
    return Text.assemble(
        (recipe, "bold"),
        f": {last.quality.told(dense)}, {pruned.flops / pruned.flops_dense:.2f}x the FLOPs, "
        f"{pruned.bytes / pruned.bytes_dense:.2f}x the size, speed {speed}\n",
        f"model: {folder / bench.model}   report: {folder / 'bench' / 'report.html'}",
    )
