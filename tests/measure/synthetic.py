"""A board whose time passes only when it is used: a load, a sleep or a look at its counter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lpvit_cli.measure.energy import EnergyRun, measure_energy
from lpvit_cli.measure.meters import Reading

IDLE_W = 60.0
READ_S = 1e-4


def constant(time_s: float) -> float:
    return 1.0


@dataclass
class Board:
    """A counter that shows the energy of its last tick. `shape(t)` modulates the power of loads."""

    tick_s: float = 0.1
    shape: Callable[[float], float] = constant
    now: float = 0.0
    joules: float = 0.0
    shown_mj: float = 1e9
    slow_until: float = 0.0  # until then the device is hot and slows its clocks down
    source: str = "synthetic"

    def __post_init__(self) -> None:
        self.next_tick = self.tick_s
        self.about: dict[str, str | float | None] = {}

    def spend(self, seconds: float, watts: float = IDLE_W) -> None:
        end = self.now + seconds
        while self.now < end - 1e-12:
            step = min(0.001, end - self.now, self.next_tick - self.now)
            self.joules += step * (watts * self.shape(self.now + step / 2) if watts != IDLE_W else watts)
            self.now += step
            if self.now >= self.next_tick - 1e-12:
                self.shown_mj = 1e9 + round(1000 * self.joules)
                self.next_tick += self.tick_s

    def sleep(self, seconds: float) -> None:
        self.spend(seconds)

    def clock(self) -> float:
        return self.now

    def read(self) -> Reading:
        self.spend(READ_S)
        return Reading(self.shown_mj, slowed_down=self.now < self.slow_until)

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
        )
