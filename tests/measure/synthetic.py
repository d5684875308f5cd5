"""A board whose time passes only when it is used: a load, a sleep or a look at its counter."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from lpvit_cli.measure.energy.meters.base import MeterError, Reading, State
from lpvit_cli.measure.energy.run import EnergyRun, measure_energy
from lpvit_cli.measure.energy.trace import PERIOD_S

IDLE_W = 60.0
READ_S = 1e-4
STEP_S = 0.001  # of changing power


def constant(time_s: float) -> float:
    return 1.0


@dataclass
class Board:
    """A counter that shows the energy of its last tick, as its sensor saw it: the last `seen` of every tick. `shape(t)`
    modulates the power of loads."""

    tick_s: float = 0.1
    seen: float = 1.0
    shape: Callable[[float], float] = constant
    slow_until: float = 0.0  # until then the device is hot and slows its clocks down
    capped: bool = False
    power_gain: float = 1.0  # of power readings; the counter has none
    power_fails_at: float = float("inf")
    mhz: Callable[[float], float | None] = lambda time_s: None
    source: str = "synthetic"
    has_counter: bool = True
    power_source: str | None = "synthetic sensor"
    fewest_calls: int = 1

    def __post_init__(self) -> None:
        self.now = 0.0
        self.joules = 0.0  # as the counter will show them at the next tick
        self.true_joules = 0.0
        self.shown_mj = 1e9
        self.shown_w = IDLE_W
        self.sensed_j = 0.0
        self.next_tick = self.tick_s
        self.poll: Callable[[], None] | None = None
        self.next_poll = 0.0

    def spend(self, seconds: float, watts: float = IDLE_W) -> None:
        end = self.now + seconds
        while self.now < end - 1e-12:
            opens = self.next_tick - self.seen * self.tick_s
            upto = min(end, self.next_tick, opens if opens > self.now + 1e-12 else end)
            if self.poll:
                upto = min(upto, max(self.next_poll, self.now + 1e-9))
            if self.shape is not constant:
                upto = min(upto, self.now + STEP_S)
            drawn = (upto - self.now) * watts
            if watts != IDLE_W:
                drawn *= self.shape((self.now + upto) / 2)
            self.true_joules += drawn
            if upto > opens + 1e-12:
                self.sensed_j += drawn
            self.now = upto
            if self.now >= self.next_tick - 1e-12:
                self._tick()
            if self.poll and self.now >= self.next_poll - 1e-12:
                self.next_poll += PERIOD_S
                self.poll()

    def _tick(self) -> None:
        seen_j, self.sensed_j = self.sensed_j, 0.0
        self.joules += seen_j / self.seen
        self.shown_w = seen_j / (self.seen * self.tick_s)
        self.shown_mj = 1e9 + round(1000 * self.joules)
        self.next_tick += self.tick_s

    def sleep(self, seconds: float) -> None:
        self.spend(seconds)

    def clock(self) -> float:
        return self.now

    def read(self) -> Reading:
        self.spend(READ_S)
        return Reading(self.shown_mj, self.now < self.slow_until, self.capped)

    def power_w(self) -> float:
        if self.now >= self.power_fails_at:
            raise MeterError("the sensor is gone")
        return self.power_gain * self.shown_w

    def state(self) -> State:
        return State(self.mhz(self.now), 40.0)

    def facts(self) -> dict[str, str | float | None]:
        return {"name": "synthetic board"}

    def notes(self) -> list[str]:
        return []

    @contextmanager
    def polling(self, sample: Callable[[], None]) -> Iterator[None]:
        self.poll, self.next_poll = sample, self.now
        try:
            yield
        finally:
            self.poll = None

    def measure(
        self, subjects: Mapping[str, Callable[[], object]], images: int = 8, trials: int = 6, window_s: float = 10.0
    ) -> EnergyRun:
        return measure_energy(
            dict(subjects),
            images,
            self,
            trials=trials,
            window_s=window_s,
            synchronize=lambda: None,
            clock=self.clock,
            sleep=self.sleep,
            polling=self.polling,
        )


TRIAL_DRIFT, OWN_NOISE = 0.02, 0.01  # log-normal, from trial to trial: of both subjects together, and of each


def coverage(experiments: int, tick_s: float = 0.1, window_s: float = 2.0) -> float:
    """Of so many experiments with six trials, the fraction whose interval holds the true ratio of energies, 1.5."""
    generator = random.Random(0)
    covered = 0
    for _ in range(experiments):
        board = Board(tick_s=tick_s)
        draws = {"dense": 1.0, "sparse": 1.0}

        def sleep(seconds: float, board: Board = board, draws: dict[str, float] = draws) -> None:
            drift = generator.gauss(0, TRIAL_DRIFT)
            draws.update({name: math.exp(drift + generator.gauss(0, OWN_NOISE)) for name in draws})
            board.sleep(seconds)

        def subject(name: str, watts: float, board: Board = board, draws: dict[str, float] = draws) -> Callable[[], None]:
            return lambda: board.spend(0.02, watts * draws[name])

        run = measure_energy(
            {"dense": subject("dense", 300), "sparse": subject("sparse", 200)},
            8,
            board,
            trials=6,
            window_s=window_s,
            synchronize=lambda: None,
            clock=board.clock,
            sleep=sleep,
            polling=board.polling,
        )
        ratio = run.ratio("dense", "sparse")
        covered += ratio.low <= 1.5 <= ratio.high
    return covered / experiments
