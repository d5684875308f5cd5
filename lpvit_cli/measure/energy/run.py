"""Joules per image: windows of an energy counter under steady load, checked against the integral of a power trace.

Subjects take turns, so that drift of temperature and clocks cancels in ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Literal

from lpvit_cli.measure.energy.meters import open_meter
from lpvit_cli.measure.energy.meters.base import Meter, MeterError
from lpvit_cli.measure.energy.trace import PowerTrace, in_background
from lpvit_cli.measure.energy.windows import Idle, Load, Subject, Window, Windows
from lpvit_cli.measure.statistics import Ratio, paired_ratio

if TYPE_CHECKING:
    import torch


COOL_DOWN = 0.1  # of a window, between turns
GOOD, INCONSISTENT = 0.03, 0.1  # difference of counter and trace
POINTS = 2000  # of a trace, in a report
SENSORS_ERR = (
    "power sensors err by about 5 % (13 % seen): an error of gain cancels in ratios, one of offset does not; images are random"
)


@dataclass(frozen=True)
class Trace:
    """Power over time, thinned to at most `POINTS` points; seconds as in `Window`."""

    seconds: list[float]
    watts: list[float]


@dataclass(frozen=True)
class Energy:
    """One subject. `above_idle` leaves out what the idle device would have drawn in the same time."""

    joules_per_image: float
    above_idle_joules_per_image: float
    average_w: float
    trials_joules_per_image: list[float]
    energy_delay_js: float | None = None  # J/image times the seconds of the call that the image is in
    peak_w: float | None = None  # the highest sample within the windows: a lower bound; None: no trace
    trace_joules_per_image: float | None = None  # by the power trace, to check the counter; None: no trace
    agreement: Literal["good", "fair", "inconsistent"] | None = None  # of counter and trace: within 3 %, 10 %, or not
    discarded: list[str] = field(default_factory=list)  # why windows were measured again
    windows: list[Window] = field(default_factory=list)  # one a trial
    trace: Trace | None = None  # of all its turns, warm-up included

    @property
    def images_per_joule(self) -> float:
        return 1 / self.joules_per_image


@dataclass(frozen=True)
class EnergyRun:
    """Energy of all subjects, or none and the reasons. `notes` are sentences a reader of the numbers should know."""

    source: str
    idle_w: float | None = None
    subjects: dict[str, Energy] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    power_source: str | None = None  # what the traces are samples of; None: no trace
    device: dict[str, str | float | None] = field(default_factory=dict)  # as the meter tells it, by facts' names

    def ratio(self, baseline: str, subject: str) -> Ratio:
        """How many times less energy an image takes with `subject`, trial by trial."""
        return paired_ratio(self.subjects[baseline].trials_joules_per_image, self.subjects[subject].trials_joules_per_image)


@dataclass
class _Turns:
    """What a subject's turns gave."""

    windows: list[Window] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)  # of turns, warm-up included
    discarded: list[str] = field(default_factory=list)
    unsettled: int = 0


def measure_energy(
    subjects: dict[str, Subject],
    images_per_call: int,
    meter: Meter,
    *,
    trials: int,
    window_s: float,
    synchronize: Callable[[], None],
    on_trial: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    polling: Callable[[Callable[[], None]], AbstractContextManager[None]] = in_background,
) -> EnergyRun:
    """`trials` windows of `window_s` seconds for each subject, in turn; a ratio needs six. Before each the device cools down
    and the load settles. A meter that fails gives reasons, not numbers. `polling` samples power meanwhile."""
    started = clock()

    def now() -> float:
        return clock() - started

    turns = {name: _Turns() for name in subjects}
    windows, trace, facts = Windows(meter, window_s, now), PowerTrace(meter.power_w, now), meter.facts()
    try:
        synchronize()
        idle = windows.idle(Idle(sleep))
        with polling(trace.sample) if meter.power_source else nullcontext():
            for number in range(trials):
                for name in list(subjects) if number % 2 == 0 else list(reversed(subjects)):
                    sleep(COOL_DOWN * windows.window_s)
                    load = Load(subjects[name], images_per_call, synchronize, now)
                    _take_turn(turns[name], load, windows, trace)
                if on_trial:
                    on_trial(number + 1, trials)
    except MeterError as error:
        return EnergyRun(meter.source, reasons=[str(error)], device=facts)
    idle_w = idle.joules / idle.seconds
    found = {name: _energy(taken, images_per_call, idle_w, trace, meter) for name, taken in turns.items()}
    notes = [*meter.notes(), *([f"the power trace broke off: {trace.fault}"] if trace.fault else [])]
    notes += [note for name, taken in turns.items() for note in _notes(name, taken, found[name])]
    return EnergyRun(meter.source, idle_w, found, [], notes, meter.power_source, facts)


def energy_on(
    device: torch.device,
    subjects: dict[str, Subject],
    images_per_call: int,
    *,
    trials: int,
    window_s: float,
    allow_mig: bool = False,
    on_trial: Callable[[int, int], None] | None = None,
) -> tuple[EnergyRun | None, list[str]]:
    """As `measure_energy`, by the meter of `device`: None when it has none; and the reasons why there is no energy."""
    uuid, synchronize = "", lambda: None
    if device.type == "cuda":
        from torch import cuda

        uuid, synchronize = str(cuda.get_device_properties(device).uuid), cuda.synchronize
    meter, reasons = open_meter(device.type, uuid, allow_mig)
    if meter is None:
        return None, reasons
    run = measure_energy(
        subjects, images_per_call, meter, trials=trials, window_s=window_s, synchronize=synchronize, on_trial=on_trial
    )
    return run, run.reasons


def saving_verdict(name: str, baseline: str, run: EnergyRun, ratio: Ratio) -> str:
    """One sentence; a saving is one only if its 95 % interval excludes 1. `baseline`, `name`: subjects of `run`."""
    interval = f"95 % interval {ratio.low:.2f} to {ratio.high:.2f}"
    dubious = [subject for subject in (baseline, name) if run.subjects[subject].agreement == "inconsistent"]
    doubt = f"; doubtful, counter and power trace of {' and '.join(dubious)} are inconsistent" if dubious else ""
    if ratio.low > 1:
        return f"{name} saves energy: an image takes {ratio.value:.2f}x less than {baseline} ({interval}){doubt}"
    if ratio.high < 1:
        return f"{name} takes {1 / ratio.value:.2f}x more energy than {baseline} (saving {ratio.value:.2f}x, {interval}){doubt}"
    return f"{name} saves no energy that can be told from noise against {baseline} ({interval}){doubt}"


def _take_turn(turns: _Turns, load: Load, windows: Windows, trace: PowerTrace) -> None:
    begin = windows.clock()
    turns.unsettled += not windows.settle(load)
    window, discarded = windows.valid(load)
    turns.windows.append(replace(window, trace_joules=trace.joules(window.begin_s, window.end_s)))
    turns.spans.append((begin, windows.clock()))
    turns.discarded += discarded


def _energy(turns: _Turns, images_per_call: int, idle_w: float, trace: PowerTrace, meter: Meter) -> Energy:
    windows = turns.windows
    peaks = [peak for w in windows if (peak := trace.peak_w(w.begin_s, w.end_s)) is not None]
    integrals = [w.trace_joules / w.images for w in windows if w.trace_joules is not None]
    checked = meter.has_counter and len(integrals) == len(windows)
    per_image = [w.joules / w.images for w in windows]
    return Energy(
        joules_per_image=median(per_image),
        above_idle_joules_per_image=median((w.joules - idle_w * w.seconds) / w.images for w in windows),
        average_w=median(w.joules / w.seconds for w in windows),
        trials_joules_per_image=per_image,
        energy_delay_js=median(w.joules / w.images * w.seconds * images_per_call / w.images for w in windows),
        peak_w=max(peaks, default=None),
        trace_joules_per_image=median(integrals) if checked else None,
        agreement=_agreement(sum(integrals) / sum(per_image)) if checked else None,
        discarded=turns.discarded,
        windows=windows,
        trace=Trace(*trace.thinned(turns.spans, POINTS)) if trace.samples else None,
    )


def _agreement(ratio: float) -> Literal["good", "fair", "inconsistent"]:
    difference = abs(ratio - 1)
    return "good" if difference <= GOOD else "fair" if difference <= INCONSISTENT else "inconsistent"


def _notes(name: str, turns: _Turns, energy: Energy) -> list[str]:
    """What a reader of one subject's numbers should know."""
    notes, trials = [], len(turns.windows)
    if energy.agreement == "inconsistent":
        counter, traced = energy.joules_per_image, energy.trace_joules_per_image
        notes.append(f"{name}: counter and power trace are inconsistent, {counter:.4g} and {traced:.4g} J/image")
    if capped := sum(window.power_capped for window in turns.windows):
        notes.append(f"{name}: at the power limit in {capped} of {trials} windows, which sets its clocks")
    if turns.discarded:
        notes.append(f"{name}: {len(turns.discarded)} windows were measured again: {turns.discarded[-1]}")
    if turns.unsettled:
        notes.append(f"{name}: throughput or clock had not settled before {turns.unsettled} of {trials} windows")
    return notes
