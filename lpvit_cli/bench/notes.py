"""Sentences on a bench's numbers: the verdicts, where sparse pays, and what makes the numbers doubtful."""

from __future__ import annotations

from collections.abc import Callable

from lpvit_cli.bench.results import BatchBench
from lpvit_cli.measure.sampling import UNSTABLE
from lpvit_cli.measure.timing import Timing

FEW_CALLS = 100


def verdicts(batches: list[BatchBench]) -> list[str]:
    """A sentence for each batch, the one where the pruned model helps most first. Where it is faster at none of several
    batches, a sentence that says so comes first."""
    faster = [batch for batch in batches if batch.speedup[batch.subject].low > 1]
    if faster:
        best = max(faster, key=lambda batch: round(batch.speedup[batch.subject].value, 2))
        return [best.verdict, *(batch.verdict for batch in batches if batch is not best)]
    sentences = [batch.verdict for batch in batches]
    if len(batches) > 1:
        sizes = ", ".join(dict.fromkeys(str(batch.batch_size) for batch in batches))
        sentences.insert(0, f"the pruned model is not faster at any batch measured: {sizes}")
    return sentences


def advice(batches: list[BatchBench]) -> list[str]:
    """Where the pruned model pays, when it does not everywhere; in the first dtype."""
    if any(batch.timing.busy for batch in batches):
        return []
    ratios = {batch.batch_size: batch.speedup[batch.subject] for batch in batches if batch.dtype == batches[0].dtype}
    faster = [size for size, ratio in ratios.items() if ratio.low > 1]
    slower = [size for size, ratio in ratios.items() if ratio.high < 1]
    if slower and faster and min(faster) > max(slower):
        return [
            f"batch {max(slower)} gives a block too little work; of the batches measured, sparse pays from {min(faster)} on"
        ]
    if slower:
        return ["where sparse is slower, blocks are too small or too few are gone: try taller blocks or more sparsity"]
    return []


def doubts(batches: list[BatchBench]) -> list[str]:
    """How far the numbers can be trusted."""
    calls = min(timed.calls for batch in batches for timed in batch.timing.subjects.values())
    notes = [f"{calls} calls: p99 is close to the slowest of them"] if calls < FEW_CALLS else []
    if unknown := _which(batches, lambda timed: timed.percentiles is None):
        notes.append(
            "percentiles of calls are not known, the calls are too short to time them one by one; img/s and speed-up come from "
            f"means of many calls: {unknown}"
        )
    if unstable := _which(batches, lambda timed: timed.unstable):
        notes.append(f"unstable, times vary by more than {UNSTABLE:.1%}: {unstable}")
    if host_bound := _which(batches, lambda timed: timed.host_bound):
        notes.append(f"host-bound, the device waits for the host (try a larger batch, or -graph): {host_bound}")
    if load := max((batch.timing.foreign_load or 0 for batch in batches if batch.timing.busy), default=0):
        notes.append(f"other processes used up to {load:.0%} of the machine: measure again when it is quiet")
    return notes


def _which(batches: list[BatchBench], flagged: Callable[[Timing], bool]) -> str:
    found = {batch.title: [name for name, timed in batch.timing.subjects.items() if flagged(timed)] for batch in batches}
    return "; ".join(f"{', '.join(names)} at {title}" for title, names in found.items() if names)
