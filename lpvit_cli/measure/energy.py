"""Joules per image: differences of an energy counter over windows that begin and end on a tick of it, under steady load.

The counter moves in ticks (about 100 ms on NVIDIA GPUs): reading it at any other moment is wrong by up to a tick at each end.
Subjects take turns, so that drift of temperature and clocks cancels in ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Literal

from lpvit_cli.measure.meters import Meter, MeterError, open_meter
from lpvit_cli.measure.statistics import Ratio, paired_ratio

if TYPE_CHECKING:
    import torch

FEWEST_TICKS = 10
RETRIES = 3
LONGEST_TICK_S = 2.0
POINTS = 2000  # of a trace, in a report

Subject = Callable[[], object]


@dataclass(frozen=True)
class Window:
    """A valid window of one subject, both ends on ticks of the counter. Seconds count from the start of the energy run."""

    begin_s: float
    end_s: float
    joules: float
    images: int
    trace_joules: float | None = None  # the power trace integrated over the window; None: no trace
    clock_mhz: float | None = None  # of a GPU's multiprocessors, at the end
    temperature_c: float | None = None  # at the end
    power_capped: bool = False


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


@dataclass(frozen=True)
class _Window:
    joules: float
    seconds: float
    calls: int


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
) -> EnergyRun:
    """`trials` windows of `window_s` seconds for each subject, in turn; a ratio needs six. A meter that fails gives reasons,
    not numbers."""
    windows: dict[str, list[_Window]] = {name: [] for name in subjects}
    try:
        synchronize()
        idle = _valid_window(lambda: sleep(0.02), meter, window_s, clock)
        for number in range(trials):
            for name in list(subjects) if number % 2 == 0 else list(reversed(subjects)):
                load = _steady_load(subjects[name], synchronize, clock)
                windows[name].append(_valid_window(load, meter, window_s, clock))
            if on_trial:
                on_trial(number + 1, trials)
    except MeterError as error:
        return EnergyRun(meter.source, reasons=[str(error)])
    idle_w = idle.joules / idle.seconds
    return EnergyRun(meter.source, idle_w, {name: _energy(w, images_per_call, idle_w) for name, w in windows.items()})


def energy_on(
    device: torch.device,
    subjects: dict[str, Subject],
    images_per_call: int,
    *,
    trials: int,
    window_s: float,
    on_trial: Callable[[int, int], None] | None = None,
) -> tuple[EnergyRun | None, list[str]]:
    """As `measure_energy`, by the meter of `device`: None when it has none; and the reasons why there is no energy."""
    uuid, synchronize = "", lambda: None
    if device.type == "cuda":
        from torch import cuda

        uuid, synchronize = str(cuda.get_device_properties(device).uuid), cuda.synchronize
    meter, reasons = open_meter(device.type, uuid)
    if meter is None:
        return None, reasons
    run = measure_energy(
        subjects, images_per_call, meter, trials=trials, window_s=window_s, synchronize=synchronize, on_trial=on_trial
    )
    return run, run.reasons


class _Load:
    """Calls a subject in groups of about 20 ms between synchronisations; counts the calls."""

    def __init__(self, subject: Subject, synchronize: Callable[[], None], group: int):
        self.subject, self.synchronize, self.calls_each = subject, synchronize, group

    def __call__(self) -> None:
        for _ in range(self.calls_each):
            self.subject()
        self.synchronize()


def _steady_load(subject: Subject, synchronize: Callable[[], None], clock: Callable[[], float]) -> _Load:
    _Load(subject, synchronize, 1)()
    start = clock()
    _Load(subject, synchronize, 3)()
    return _Load(subject, synchronize, max(1, round(0.02 * 3 / max(1e-6, clock() - start))))


def _valid_window(load: Callable[[], None], meter: Meter, window_s: float, clock: Callable[[], float]) -> _Window:
    """A window in which the counter rose and nothing slowed the device down; a few tries."""
    for _ in range(1 + RETRIES):
        window, fault = _window(load, meter, window_s, clock)
        if window is not None:
            return window
    raise MeterError(f"no valid window in {1 + RETRIES} tries: {fault}")


def _window(load: Callable[[], None], meter: Meter, window_s: float, clock: Callable[[], float]) -> tuple[_Window | None, str]:
    start = _until_tick(load, meter, clock)
    if start is None:
        return None, f"the counter did not move for {LONGEST_TICK_S:g} s"
    begin, first, _ = start
    groups, ticks, last, now, slowed = 0, 0, first, begin, False
    while now - begin < window_s:
        tick = _until_tick(load, meter, clock)
        if tick is None:
            return None, f"the counter did not move for {LONGEST_TICK_S:g} s"
        now, reading, steps = tick
        groups, ticks, slowed = groups + steps, ticks + 1, slowed or reading.slowed_down
        if reading.energy_mj < last.energy_mj:
            return None, "the counter ran backwards"
        last = reading
    if slowed:
        return None, "the device was slowed down (thermal or power brake)"
    if ticks < FEWEST_TICKS:
        tick_ms = 1000 * (now - begin) / ticks
        raise MeterError(f"{window_s:g} s is under {FEWEST_TICKS} ticks of {tick_ms:.0f} ms: raise bench.energy.window_seconds")
    joules = (last.energy_mj - first.energy_mj) / 1000
    return _Window(joules, now - begin, groups * getattr(load, "calls_each", 1)), ""


def _until_tick(load: Callable[[], None], meter: Meter, clock: Callable[[], float]):  # type: ignore[no-untyped-def]
    """Run the load until the counter moves: (time, reading, how often the load ran), or None when it stands still."""
    before, start, steps = meter.read(), clock(), 0
    while clock() - start < LONGEST_TICK_S:
        load()
        steps += 1
        reading = meter.read()
        if reading.energy_mj != before.energy_mj:
            return clock(), reading, steps
    return None


def _energy(windows: list[_Window], images_per_call: int, idle_w: float) -> Energy:
    per_image = [w.joules / (w.calls * images_per_call) for w in windows]
    above = [(w.joules - idle_w * w.seconds) / (w.calls * images_per_call) for w in windows]
    return Energy(median(per_image), median(above), median(w.joules / w.seconds for w in windows), per_image)
