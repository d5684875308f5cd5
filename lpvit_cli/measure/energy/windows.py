"""Windows of an energy counter that begin and end on a tick of it, under steady load.

The counter moves in ticks (about 100 ms on NVIDIA GPUs): reading it at any other moment is wrong by up to a tick at each end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lpvit_cli.measure.energy.meters.base import Meter, MeterError

FEWEST_TICKS = 10
RETRIES = 3
LONGEST_TICK_S = 2.0
USUAL_TICK_S = 0.1  # a slower counter gets longer windows: the default of 10 s is 100 ticks
GROUP_S = 0.02  # of calls between two looks at the counter
SETTLED = 0.02  # spread of throughput and clock at which a load is steady
WARM_UP, LONGEST_WARM_UP = 0.5, 2.0  # in windows
WARM_UP_STEP = 0.1
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

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


class Load:
    """Calls a subject in groups of about `GROUP_S` between synchronisations."""

    def __init__(self, subject: Subject, images_per_call: int, synchronize: Callable[[], None], clock: Callable[[], float]):
        self.subject, self.images_per_call, self.synchronize, self.calls = subject, images_per_call, synchronize, 1
        self()
        start = clock()
        self()
        self.calls = max(1, round(GROUP_S / max(1e-6, clock() - start)))

    def __call__(self) -> None:
        for _ in range(self.calls):
            self.subject()
        self.synchronize()


class Idle:
    """The device with its context alive and nothing to do."""

    calls = 1
    images_per_call = 0

    def __init__(self, sleep: Callable[[float], None]):
        self.sleep = sleep

    def __call__(self) -> None:
        self.sleep(GROUP_S)


class Windows:
    """Windows of one meter, `window_s` long or longer."""

    def __init__(self, meter: Meter, window_s: float, clock: Callable[[], float]):
        self.meter, self.window_s, self.clock = meter, window_s, clock

    def idle(self, idle: Idle) -> Window:
        """The window before all others: it shows how often the counter ticks. Raises MeterError when that is too seldom."""
        window, ticks, _ = self._valid(idle)
        tick_s = window.seconds / ticks
        if self.window_s < FEWEST_TICKS * tick_s:
            raise MeterError(
                f"{self.window_s:g} s is under {FEWEST_TICKS} ticks of {1000 * tick_s:.0f} ms: "
                "raise bench.energy.window_seconds"
            )
        self.window_s *= max(1.0, tick_s / USUAL_TICK_S)
        return window

    def settle(self, load: Load) -> bool:
        """Run the load until throughput and clock of the device are steady; whether they became so."""
        begin = self.clock()
        rates: list[float] = []
        clocks: list[float | None] = []
        while (passed := self.clock() - begin) < LONGEST_WARM_UP * self.window_s:
            recent = rates[-3:], [mhz for mhz in clocks[-3:] if mhz]
            if passed >= WARM_UP * self.window_s and len(rates) >= 3 and all(map(_steady, recent)):
                return True
            start, calls = self.clock(), 0
            while self.clock() - start < WARM_UP_STEP * self.window_s:
                load()
                calls += load.calls
            rates.append(calls / (self.clock() - start))
            clocks.append(self.meter.state().clock_mhz)
        return False

    def valid(self, load: Load) -> tuple[Window, list[str]]:
        """A window of the load, and why others before it were discarded. Raises MeterError after a few tries."""
        window, _, faults = self._valid(load)
        return window, faults

    def _valid(self, load: Load | Idle) -> tuple[Window, int, list[str]]:
        """A window in which the counter rose and nothing slowed the device down, its ticks, and what was wrong before."""
        faults: list[str] = []
        while len(faults) <= RETRIES:
            found = self._window(load)
            if not isinstance(found, str):
                return *found, faults
            faults.append(found)
        raise MeterError(f"no valid window in {1 + RETRIES} tries: {faults[-1]}")

    def _window(self, load: Load | Idle) -> tuple[Window, int] | str:
        """A window and its ticks, or what was wrong with it."""
        start = self._until_tick(load)
        if start is None:
            return f"the counter did not move for {LONGEST_TICK_S:g} s"
        begin, first, _ = start
        calls, ticks, last, now, slowed, capped = 0, 0, first, begin, False, False
        while now - begin < self.window_s or (load.images_per_call and calls < self.meter.fewest_calls):
            tick = self._until_tick(load)
            if tick is None:
                return f"the counter did not move for {LONGEST_TICK_S:g} s"
            now, reading, groups = tick
            calls, ticks = calls + groups * load.calls, ticks + 1
            slowed, capped = slowed or reading.slowed_down, capped or reading.power_capped
            if reading.energy_mj < last.energy_mj:
                return "the counter ran backwards"
            last = reading
        if slowed:
            return "the device was slowed down (thermal or power brake)"
        state, joules = self.meter.state(), (last.energy_mj - first.energy_mj) / 1000
        images = calls * load.images_per_call
        window = Window(begin, now, joules, images, None, state.clock_mhz, state.temperature_c, capped)
        return window, ticks

    def _until_tick(self, load: Load | Idle):  # type: ignore[no-untyped-def]
        """Run the load until the counter moves: (time, reading, how often the load ran), or None when it stands still."""
        before, start, groups = self.meter.read(), self.clock(), 0
        while self.clock() - start < LONGEST_TICK_S:
            load()
            groups += 1
            reading = self.meter.read()
            if reading.energy_mj != before.energy_mj:
                return self.clock(), reading, groups
        return None


def _steady(values: list[float]) -> bool:
    return not values or max(values) - min(values) <= SETTLED * max(values)
