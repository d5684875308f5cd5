"""How fast is an exported file, beside what a user gets free: forms of the dense model that need no pruning?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lpvit_cli.export.results import ExportSpeed, FreeForm
from lpvit_cli.export.source import Source
from lpvit_cli.measure.timing import Subject, TimingRun, time_in_visits, verdict
from lpvit_cli.progress import Progress

DENSE = "dense"  # the subject of `speedup`: dense float32 in the file's own runtime
VISITS, SAMPLES = 3, 4  # of each file that is timed


@dataclass(frozen=True)
class Free:
    """A form of the dense model, in words. `judge`: its quality (None: not known); without one it is the float32 model's."""

    name: str
    open: Callable[[], Subject]
    judge: Callable[[], Any] | None = None


def measure(
    source: Source, file: str, open_file: Callable[[], Subject], free: Sequence[Free], progress: Progress
) -> ExportSpeed:
    """The file against the free forms, in turn, one alive at a time. The first of them is dense float32 in the same runtime."""
    subjects = {DENSE if form is free[0] else form.name: form for form in free}
    timing = time_in_visits(
        {subject: form.open for subject, form in subjects.items()} | {file: open_file},
        visits=VISITS,
        samples=SAMPLES,
        threads=source.threads,
        on_visit=lambda done, total: progress(f"timing {file}", done, total, f"{done}/{total}"),
    )
    forms, best = judged(source, subjects, timing, file)
    ratio, speedup = timing.ratio(best.subject, file), timing.ratio(DENSE, file)
    label = best.name if len(free) == 1 else f"the best free alternative: {best.name}"
    beside = "" if best.subject == DENSE else f"; {speedup.value:.2f}x as fast as {free[0].name}"
    return ExportSpeed(
        threads=source.threads,
        batch_size=source.batch_size,
        timing=timing,
        speedup=speedup,
        free=forms,
        best_free=best.name,
        speedup_over_best_free=ratio,
        verdict=verdict(file, label, ratio, timing, timing.subjects[file]) + beside,
    )


def judged(source: Source, free: dict[str, Free], timing: TimingRun, file: str) -> tuple[list[FreeForm], FreeForm]:
    """The free forms by subject of `timing`, and the fastest that keeps its quality. Slower ones need not be evaluated."""
    forms = {
        subject: FreeForm(
            name=form.name,
            subject=subject,
            median_ms=timing.subjects[subject].median_ms,
            speedup=timing.ratio(subject, file),
            quality=None if form.judge else source.quality_dense,
        )
        for subject, form in free.items()
    }
    for form in sorted(forms.values(), key=lambda form: form.median_ms):
        if judge := free[form.subject].judge:
            if form.name not in source.qualities:
                source.qualities[form.name] = judge()
            form.quality = source.qualities[form.name]
        form.counts = form.quality is None or form.quality.score[0] >= source.least_score(source.quality_dense)
        if form.counts:
            return list(forms.values()), form
        if (note := _lost(form, source)) not in source.notes:
            source.notes.append(note)
    raise AssertionError("dense float32 loses nothing")


def _lost(form: FreeForm, source: Source) -> str:
    now, before = source.qualities[form.name].figures[0], source.quality_dense.figures[0]
    return (
        f"{form.name} is no alternative: {now.name} {now.text}, dense float32 {before.text}, more than export.max_drop = "
        f"{source.settings.max_drop:g} points are lost"
    )
