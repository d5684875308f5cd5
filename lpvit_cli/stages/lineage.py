"""What was done to the model that a stage takes."""

from __future__ import annotations

from lpvit_cli.pipeline.run import Run
from lpvit_cli.pipeline.stage import Stage
from lpvit_cli.report.schema import FinetuneReport, GradualReport, PruneReport
from lpvit_cli.stages import FINETUNE, GRADUAL, PRUNE


def made_by(run: Run, stage: Stage) -> tuple[PruneReport, FinetuneReport | None]:
    """How the model of bench or export was pruned, and recovered if it was."""
    source = run.upstream(stage)
    if source is GRADUAL:
        report: GradualReport = run.report(GRADUAL)
        return report.steps[-1].pruned, report.steps[-1].recovered
    return run.report(PRUNE), run.report(FINETUNE) if source is FINETUNE else None
