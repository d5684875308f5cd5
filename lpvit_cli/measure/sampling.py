"""One sample of a subject: how many calls it holds, and whether the clock can tell each of them.

The host's clock adds about 0.15 us to a call, a pair of CUDA events errs by about 0.5 us. Calls that are long enough for an
error below a percent are timed one by one. Of shorter ones a sample knows only the mean: nobody knows their percentiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from lpvit_cli.measure.statistics import coefficient_of_variation

UNSTABLE = 0.025  # coefficient of variation above which a subject is called unstable
SHORTEST_SAMPLE_S = 2e-3  # shorter calls are repeated within a sample
SHORTEST_CALL_S, SHORTEST_GPU_CALL_S = 20e-6, 100e-6  # shorter calls cannot be timed one by one
Subject = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """Milliseconds of a call: the mean of the sample's calls, and each of them where the clock can tell."""

    ms: float
    host_ms: float  # thread CPU time of a call; on a GPU the time that the host takes to enqueue it
    calls_ms: list[float] | None


@dataclass(frozen=True)
class Sampling:
    """How a subject is sampled. Only `of` decides that, once a subject, from how long its calls take."""

    calls: int  # in a sample
    one_by_one: bool  # whether each call is timed by itself

    @classmethod
    def of(cls, call_s: float, device: torch.device) -> Sampling:
        """`call_s`: seconds of a call."""
        shortest = SHORTEST_GPU_CALL_S if device.type == "cuda" else SHORTEST_CALL_S
        return cls(max(1, round(SHORTEST_SAMPLE_S / max(1e-9, call_s))), one_by_one=call_s >= shortest)

    def take(self, subject: Subject, device: torch.device) -> Sample:
        laps, lap = (self.calls, subject) if self.one_by_one else (1, partial(_repeat, subject, self.calls))
        laps_ms, host_ms = (_laps_on_gpu if device.type == "cuda" else _laps_on_cpu)(lap, laps)
        return Sample(sum(laps_ms) / self.calls, host_ms / self.calls, laps_ms if self.one_by_one else None)


def warm_up(subject: Subject, device: torch.device, seconds: float) -> Sampling:
    """Run until the last calls agree or `seconds` are over; returns how to sample the subject."""
    recent: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(recent) < 2 or (time.perf_counter() < deadline and not _steady(recent)):
        start = time.perf_counter()
        subject()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        recent.append(time.perf_counter() - start)
    return Sampling.of(min(recent), device)


def _steady(samples: list[float]) -> bool:
    return len(samples) >= 10 and coefficient_of_variation(samples[-5:]) < UNSTABLE


def _repeat(subject: Subject, times: int) -> None:
    for _ in range(times):
        subject()


def _laps_on_cpu(lap: Subject, laps: int) -> tuple[list[float], float]:
    """Wall milliseconds of each lap, and thread CPU milliseconds of all."""
    cpu, marks = time.thread_time_ns(), [time.perf_counter_ns()]
    for _ in range(laps):
        lap()
        marks.append(time.perf_counter_ns())
    cpu = time.thread_time_ns() - cpu
    return [(end - begin) * 1e-6 for begin, end in pairwise(marks)], cpu * 1e-6


def _laps_on_gpu(lap: Subject, laps: int) -> tuple[list[float], float]:
    """GPU milliseconds of each lap, and milliseconds to enqueue all. The host waits once, at the end."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(laps + 1)]
    for mark in marks:
        mark.record()  # the driver creates an event when it is first recorded
    torch.cuda.synchronize()
    enqueue = time.perf_counter_ns()
    marks[0].record()
    for mark in marks[1:]:
        lap()
        mark.record()
    enqueue = time.perf_counter_ns() - enqueue
    marks[-1].synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(marks)], enqueue * 1e-6
