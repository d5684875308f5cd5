"""Power over time: samples of a meter's power reading, each held until the next; to check a counter, and to draw."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from lpvit_cli.measure.energy.meters.base import MeterError

PERIOD_S = 0.05
LONGEST_GAP_S = 1.0  # between samples; over a longer one nothing is known


class PowerTrace:
    """`sample` may be called from another thread. A reading that fails ends the trace: `fault` says why."""

    def __init__(self, power_w: Callable[[], float], clock: Callable[[], float]):
        self.power_w, self.clock = power_w, clock
        self.samples: list[tuple[float, float]] = []  # seconds, watts
        self.fault: str | None = None

    def sample(self) -> None:
        if self.fault is None:
            try:
                self.samples.append((self.clock(), self.power_w()))
            except MeterError as error:
                self.fault = str(error)

    def joules(self, begin_s: float, end_s: float) -> float | None:
        """Of the samples between two times; None where some are missing."""
        times, watts = self._columns()
        first, last = np.searchsorted(times, (begin_s, end_s), side="right")
        held = watts[max(0, first - 1) : last]
        edges = np.concatenate(([begin_s], times[first:last], [end_s]))
        if first == 0 or np.diff([times[first - 1], *edges[1:]]).max() > LONGEST_GAP_S:
            return None
        return float(held @ np.diff(edges))

    def peak_w(self, begin_s: float, end_s: float) -> float | None:
        times, watts = self._columns()
        within = watts[(times >= begin_s) & (times <= end_s)]
        return float(within.max()) if within.size else None

    def thinned(self, turns: list[tuple[float, float]], points: int) -> tuple[list[float], list[float]]:
        """Seconds and watts of the samples within `turns`, neighbours averaged so that at most `points` are left."""
        times, watts = self._columns()
        within = np.any([(times >= begin) & (times <= end) for begin, end in turns], axis=0)
        each = max(1, -(-int(within.sum()) // points))
        starts = np.arange(0, int(within.sum()), each)
        if starts.size == 0:
            return [], []
        counts = np.diff([*starts, within.sum()])
        means = (np.add.reduceat(column[within], starts) / counts for column in (times, watts))
        seconds, power = (np.round(mean, 3).tolist() for mean in means)
        return seconds, power

    def _columns(self) -> tuple[np.ndarray, np.ndarray]:
        columns = np.array(list(self.samples), dtype=np.float64).reshape(-1, 2)
        return columns[:, 0], columns[:, 1]


@contextmanager
def in_background(sample: Callable[[], None]) -> Iterator[None]:
    """`sample` is called every `PERIOD_S` seconds by a thread of its own."""
    done = threading.Event()

    def poll() -> None:
        while not done.wait(PERIOD_S):
            sample()

    thread = threading.Thread(target=poll, name="power trace", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=1.0)  # a lost GPU may never answer
