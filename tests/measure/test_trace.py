"""The power trace against integrals by hand, and its thread."""

from __future__ import annotations

import threading

import pytest

from lpvit_cli.measure.energy.meters.base import MeterError
from lpvit_cli.measure.energy.trace import PowerTrace, in_background


def trace_of(samples: list[tuple[float, float]]) -> PowerTrace:
    trace = PowerTrace(lambda: 0.0, lambda: 0.0)
    trace.samples = samples
    return trace


def test_each_sample_holds_until_the_next() -> None:
    trace = trace_of([(0.0, 100.0), (0.5, 200.0), (0.6, 400.0), (1.2, 50.0)])
    assert trace.joules(0.0, 1.2) == pytest.approx(0.5 * 100 + 0.1 * 200 + 0.6 * 400)
    assert trace.joules(0.25, 1.0) == pytest.approx(0.25 * 100 + 0.1 * 200 + 0.4 * 400)
    assert trace.joules(0.52, 0.58) == pytest.approx(0.06 * 200)
    assert trace.peak_w(0.25, 1.0) == 400
    assert trace.peak_w(0.7, 1.0) is None


def test_where_samples_are_missing_nothing_is_known() -> None:
    trace = trace_of([(0.5, 100.0), (0.6, 100.0), (1.9, 100.0)])
    assert trace.joules(0.4, 0.6) is None, "nothing is known before the first"
    assert trace.joules(0.5, 1.0) is not None
    assert trace.joules(0.5, 1.9) is None, "1.3 s without one"
    assert trace_of([]).joules(0.0, 1.0) is None


def test_thinning_keeps_the_mean_and_leaves_out_what_is_not_a_turn() -> None:
    trace = trace_of([(0.1 * k, float(k)) for k in range(100)])
    seconds, watts = trace.thinned([(1.0, 2.95), (5.0, 6.95)], 8)
    assert len(seconds) == len(watts) == 8
    assert sum(watts) / 8 == pytest.approx(sum([*range(10, 30), *range(50, 70)]) / 40)
    assert trace.thinned([(20.0, 30.0)], 8) == ([], [])


def test_the_thread_samples_until_it_is_told_to_stop_and_a_fault_ends_the_trace() -> None:
    enough = threading.Event()
    taken = []

    def sample() -> None:
        taken.append(threading.current_thread().name)
        if len(taken) >= 3:
            enough.set()

    with in_background(sample):
        assert enough.wait(10)
    assert set(taken) == {"power trace"}
    assert "power trace" not in [thread.name for thread in threading.enumerate()]

    def fail() -> float:
        raise MeterError("gone")

    broken = PowerTrace(fail, lambda: 0.0)
    broken.sample()
    broken.sample()
    assert (broken.samples, broken.fault) == ([], "gone")
