"""bench --compare: two reports of bench, before and after; more time or energy beyond the interval fails the check."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from pydantic import ValidationError

from lpvit_cli.bench.results import BatchBench, Change, What
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.files import reason
from lpvit_cli.measure.statistics import unpaired_ratio
from lpvit_cli.recipe.measure import DENSE, PRUNED
from lpvit_cli.report.schema import BenchReport, CompareReport
from lpvit_cli.stages import BENCH

Samples = dict[str, list[float]]
MADE_BY = "give the report.json, or the run folder, of `lpvit bench RECIPE`"


def compare(before: Path, after: Path, force: bool) -> CompareReport:
    """Raises UsageError for reports of different devices or settings, unless forced, and where nothing is in both."""
    old, new = read_report(before), read_report(after)
    differences = differing(old, new)
    if differences and not force:
        raise UsageError(
            f"{before} and {after} are not comparable: {'; '.join(differences)}",
            "measure both alike, or pass --force to compare them all the same",
        )
    changes = [change for batch, later in _in_both(old, new) for change in _changes(batch, later)]
    if not changes:
        raise UsageError(f"{before} and {after} have no subject of the same batch size and dtype", "bench both with one recipe")
    return CompareReport(
        device=new.device,
        notes=[f"{side} report: {note}" for side, report in (("first", old), ("second", new)) for note in _busy(report)],
        before=str(before),
        after=str(after),
        differences=differences,
        changes=changes,
        verdict=verdict(changes),
    )


def read_report(path: Path) -> BenchReport:
    """A report.json of bench, by its own path, or that of its folder or run folder."""
    candidates = (path, path / "report.json", path / BENCH.folder / "report.json")
    file = next((candidate for candidate in reversed(candidates) if candidate.is_file()), None)
    if file is None:
        raise UsageError(f"{path}: no report of bench there", MADE_BY)
    try:
        return BenchReport.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentFault(f"{file}: cannot be read: {reason(error)}", MADE_BY) from error
    except ValidationError as error:
        raise UsageError(f"{file}: not a report of this lpvit's bench: {reason(error)}", f"{MADE_BY} made now") from error


def differing(old: BenchReport, new: BenchReport) -> list[str]:
    """What makes two reports incomparable."""
    facts = {
        "device": (old.device, new.device),
        "CPU": (old.machine.get("cpu"), new.machine.get("cpu")),
        "CPU threads": (old.threads, new.threads),
        "dense GFLOPs of an image": (old.flops_dense / 1e9, new.flops_dense / 1e9),
        "dtypes": (", ".join(old.dtypes), ", ".join(new.dtypes)),
        "batch sizes": (_sizes(old), _sizes(new)),
        "subjects": (_names(old), _names(new)),
    }
    return [f"{what}: {before} -> {after}" for what, (before, after) in facts.items() if before != after]


def verdict(changes: list[Change]) -> str:
    """One sentence about the pruned subjects, and whether the dense ones, which nobody changed, moved too."""
    counted = [change for change in changes if change.subject.startswith(PRUNED)]
    dense = [change for change in changes if change.subject.startswith(DENSE)]
    moved = [_said(change) for change in dense if not change.ratio.low <= 1 <= change.ratio.high]
    control = f"; the machine has changed: {', '.join(moved)}" if moved else ""
    if worse := [_said(change) for change in counted if change.worse]:
        return f"worse: {', '.join(worse)}{control}"
    better = sum(change.ratio.low > 1 for change in counted)
    return f"not worse: {better} of {len(counted)} numbers improved, the others are not worse beyond their intervals{control}"


def _in_both(old: BenchReport, new: BenchReport) -> list[tuple[BatchBench, BatchBench]]:
    later = {(batch.dtype, batch.batch_size): batch for batch in new.batches}
    pairs = [(batch, later.get((batch.dtype, batch.batch_size))) for batch in old.batches]
    return [(batch, other) for batch, other in pairs if other]


def _changes(old: BatchBench, new: BatchBench) -> list[Change]:
    ms = [{name: timed.samples_ms for name, timed in batch.timing.subjects.items()} for batch in (old, new)]
    joules = [
        {name: energy.trials_joules_per_image for name, energy in batch.energy.subjects.items()} if batch.energy else {}
        for batch in (old, new)
    ]
    return [*_changes_of("ms", old, *ms), *_changes_of("J/image", old, *joules)]


def _changes_of(what: What, batch: BatchBench, before: Samples, after: Samples) -> list[Change]:
    """Slower, or using more energy, by more than the dense baseline moved by: that is the machine's doing."""
    ratios = {name: unpaired_ratio(before[name], after[name]) for name in before if name in after}
    control = ratios[batch.baseline].low if batch.baseline in ratios and batch.baseline.startswith(DENSE) else 1.0
    return [
        Change(
            dtype=batch.dtype,
            batch_size=batch.batch_size,
            subject=name,
            what=what,
            before=median(before[name]),
            after=median(after[name]),
            ratio=ratio,
            worse=name.startswith(PRUNED) and ratio.high < min(1.0, control),
        )
        for name, ratio in ratios.items()
    ]


def _said(change: Change) -> str:
    times, worse = max(change.ratio.value, 1 / change.ratio.value), change.ratio.value < 1
    how = f"is {times:.2f}x {'slower' if worse else 'faster'}"
    if change.what == "J/image":
        how = f"uses {times:.2f}x {'more' if worse else 'less'} energy"
    return f"{change.subject} {how} at batch {change.batch_size}, {change.dtype}"


def _busy(report: BenchReport) -> list[str]:
    loads = [batch.timing.foreign_load or 0 for batch in report.batches if batch.timing.busy]
    return [f"other processes used up to {max(loads):.0%} of the machine"] if loads else []


def _sizes(report: BenchReport) -> str:
    return ", ".join(dict.fromkeys(str(batch.batch_size) for batch in report.batches))


def _names(report: BenchReport) -> str:
    return ", ".join(dict.fromkeys(name for batch in report.batches for name in batch.timing.subjects))
