"""The timing protocol under a clock that only the subjects move."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from lpvit_cli.measure import sampling, timing
from lpvit_cli.measure.statistics import Ratio
from lpvit_cli.measure.timing import Timing, TimingRun, time_in_visits, time_interleaved, verdict

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


class FakeTime:
    """Stands in for the `time` module. `spend` passes wall time, `cpu` seconds of it on this thread."""

    def __init__(self) -> None:
        self.now = self.cpu = 0.0

    def spend(self, seconds: float, cpu: float = 0.0) -> None:
        self.now += seconds
        self.cpu += cpu

    def perf_counter(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.cpu

    def perf_counter_ns(self) -> int:
        return round(self.now * 1e9)

    def thread_time_ns(self) -> int:
        return round(self.cpu * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(timing, "time", fake)
    monkeypatch.setattr(sampling, "time", fake)
    return fake


@pytest.fixture
def one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(
    subjects: Mapping[str, Callable[[], object]], rounds: int = 6, device: torch.device = CPU, warmup: float = 0.1
) -> TimingRun:
    return time_interleaved(dict(subjects), device=device, rounds=rounds, warmup_seconds=warmup, on_round=None)


def test_rounds_go_there_and_back(clock: FakeTime) -> None:
    called: list[str] = []
    rounds: list[tuple[int, int, int]] = []

    def subject(name: str) -> Callable[[], None]:
        def call() -> None:
            called.append(name)
            clock.spend(0.005)

        return call

    subjects: dict[str, Callable[[], object]] = {name: subject(name) for name in "ABC"}
    time_interleaved(
        subjects,
        device=CPU,
        rounds=6,
        warmup_seconds=0.1,
        on_round=lambda done, total: rounds.append((done, total, len(called))),
    )
    assert "".join(called[-18:]) == "ABCCBA" * 3
    start = len(called) - 18
    assert rounds == [(n, 6, start + 3 * n) for n in range(1, 7)]


def test_times_are_per_call_and_short_calls_are_repeated(clock: FakeTime) -> None:
    result = run({"long": lambda: clock.spend(0.010), "short": lambda: clock.spend(1e-5)})
    long, short = result.subjects["long"], result.subjects["short"]
    assert long.calls_per_sample == 1
    assert long.samples_ms == pytest.approx([10.0] * 6)
    assert short.calls_per_sample >= 100  # 1 ms or more
    assert short.samples_ms == pytest.approx([0.01] * 6)
    assert long.percentiles is not None
    assert long.percentiles.p50 == long.mean_ms == pytest.approx(10)
    assert not long.unstable
    assert not long.host_bound
    assert result.ratio("long", "short").value == pytest.approx(1000)
    json.dumps(asdict(result))
    first = iter([1.0])
    assert run({"cold": lambda: clock.spend(next(first, 1e-5))}).subjects["cold"].calls_per_sample >= 100


def test_warm_up_is_not_in_the_samples_and_is_bounded(clock: FakeTime) -> None:
    durations = iter([1.0, *[0.02 + 0.01 * (n % 3) for n in range(40)]] + [0.005] * 100)
    result = run({"a": lambda: clock.spend(next(durations)), "b": lambda: clock.spend(0.005)}, warmup=0.5)
    assert max(result.subjects["a"].samples_ms) < 100
    never_steady = iter(range(1, 10**6))
    clock.now = 0
    run({"c": lambda: clock.spend(0.001 * (1 + next(never_steady) % 7))}, rounds=6, warmup=2.0)
    assert clock.now < 2.0 + 0.1 + 6 * 0.05


def test_warm_up_ends_once_the_last_calls_agree_and_not_before_ten(clock: FakeTime) -> None:
    called: list[float] = []

    def call() -> None:
        called.append(clock.now)
        clock.spend(1.0 if len(called) == 1 else 0.005)  # the first call pays for everything

    run({"a": call}, warmup=60)
    assert len(called) == 10 + 6


def test_varying_times_are_called_unstable(clock: FakeTime) -> None:
    calls = iter(range(10**6))
    result = run(
        {"calm": lambda: clock.spend(0.005), "nervous": lambda: clock.spend(0.005 + 0.002 * (next(calls) % 2))}, rounds=10
    )
    assert result.subjects["nervous"].unstable
    assert not result.subjects["calm"].unstable


@pytest.mark.usefixtures("one_thread")
def test_cpu_time_of_the_thread_is_told_for_one_thread_only(clock: FakeTime) -> None:
    subjects = {"a": lambda: clock.spend(0.005, cpu=0.0045)}
    assert run(subjects).subjects["a"].cpu_time_ms == pytest.approx(4.5)
    assert not run(subjects).subjects["a"].host_bound  # the CPU is the device
    short = run({"short": lambda: clock.spend(1e-5, cpu=8e-6)}).subjects["short"]
    assert short.cpu_time_ms == pytest.approx(0.008), "of one call, not of all in a sample"
    torch.set_num_threads(2)
    assert run(subjects).subjects["a"].cpu_time_ms is None


def test_foreign_load_is_the_share_of_other_processes(clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores; this process keeps half of one busy, others 30 % of the machine, a tenth of that stolen by the host."""

    class Stat:
        def __init__(self, path: str) -> None:
            assert path == "/proc/stat"

        def read_text(self) -> str:
            hundredths = 100 * clock.now
            user, steal = 0.5 * hundredths + 0.54 * hundredths, 0.06 * hundredths
            idle = 2 * hundredths - user - steal
            fifth = f"{user / 5:.0f}"  # user, nice, system, irq and softirq are all busy; waiting for a disk is not
            fields = [fifth, fifth, fifth, f"{idle / 2:.0f}", f"{idle / 2:.0f}", fifth, fifth, f"{steal:.0f}"]
            return f"cpu  {' '.join(fields)} 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"

    monkeypatch.setattr(timing, "Path", Stat)
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(timing.os, "sysconf", lambda name: 100)
    result = run({"a": lambda: clock.spend(1.0, cpu=0.5)}, rounds=20)
    assert result.foreign_load == pytest.approx(0.3, abs=0.01)


def test_foreign_load_is_unknown_without_proc_stat(clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: object) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(timing, "Path", absent)
    assert run({"a": lambda: clock.spend(0.005)}).foreign_load is None


class Gpu:
    """A pretended GPU: a call of `work()` seconds is enqueued in `launch()` seconds and runs after those before it."""

    def __init__(self, clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.now, self.waited = clock, 0.0, 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(gpu.now, clock.now)

            def elapsed_time(self, other: Event) -> float:
                assert clock.now >= other.at, "read before the GPU was there"
                return 1000 * (other.at - self.at)

            def synchronize(self) -> None:
                gpu.synchronize()

        class Current:
            def __init__(self, device: torch.device):
                self.device = device

            def __enter__(self) -> None:
                gpu.current.append(self.device)

            def __exit__(self, *_: object) -> None:
                gpu.current.pop()

        self.current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "device", Current)

    def synchronize(self, device: object = None) -> None:
        self.waited += 1
        self.clock.now = max(self.clock.now, self.now)

    def call(self, work_s: float, launch_s: float) -> None:
        assert self.current == [GPU], "events belong to the GPU that is measured"
        self.now = max(self.now, self.clock.now) + work_s
        self.clock.spend(launch_s)


@pytest.mark.parametrize(("launch_ms", "host_bound"), [(1.0, False), (4.5, True)])
def test_a_gpu_is_host_bound_when_launching_takes_most_of_its_time(
    clock: FakeTime, monkeypatch: pytest.MonkeyPatch, launch_ms: float, host_bound: bool
) -> None:
    """Launches return after `launch_ms`, the work takes 5 ms after the launch began."""
    gpu = Gpu(clock, monkeypatch)
    timed = run({"a": lambda: gpu.call(0.005, launch_ms / 1000)}, device=GPU).subjects["a"]
    assert timed.samples_ms == pytest.approx([5.0] * 6)
    assert timed.host_bound is host_bound
    assert timed.cpu_time_ms is None


# percentiles of calls


class Spiky:
    """A subject whose every 20th call is a spike; `true_ms`: what each call took."""

    def __init__(self, usual_ms: float, spike_ms: float, pass_ms: Callable[[float], None]):
        self.usual_ms, self.spike_ms, self.pass_ms = usual_ms, spike_ms, pass_ms
        self.true_ms: list[float] = []

    def __call__(self) -> None:
        ms = self.spike_ms if len(self.true_ms) % 20 == 19 else self.usual_ms * (1 + 0.001 * (len(self.true_ms) % 7))
        self.true_ms.append(ms)
        self.pass_ms(ms)


def require_percentiles_of_calls(timed: Timing, spiky: Spiky) -> None:
    """Against numpy on what each of the timed calls took: those after the warm-up."""
    true_ms = spiky.true_ms[-timed.calls :]
    assert timed.calls == len(timed.samples_ms) * timed.calls_per_sample < len(spiky.true_ms)
    assert timed.percentiles is not None
    expected = np.percentile(true_ms, (10, 50, 90, 95, 99))
    assert list(asdict(timed.percentiles).values()) == pytest.approx(expected.tolist(), rel=1e-4)
    assert timed.percentiles.p99 == pytest.approx(spiky.spike_ms, rel=1e-4), "one call of twenty"
    assert timed.percentiles.p50 < 1.01 * spiky.usual_ms
    assert timed.mean_ms == pytest.approx(np.mean(true_ms), rel=1e-4)
    assert timed.variation == pytest.approx(np.std(true_ms) / np.mean(true_ms), rel=1e-4)
    assert timed.quantiles_ms == pytest.approx(np.percentile(true_ms, range(101)).tolist(), rel=1e-4)
    rounds = np.reshape(true_ms, (len(timed.samples_ms), timed.calls_per_sample)).mean(axis=1)
    assert timed.samples_ms == pytest.approx(rounds.tolist(), rel=1e-4)
    assert timed.median_ms == pytest.approx(np.median(rounds), rel=1e-4)


def test_percentiles_are_of_single_calls_also_of_fast_ones(clock: FakeTime) -> None:
    """0.1 ms and 12.3 ms: a mean of 20 calls is 0.71 ms, which no call takes."""
    spiky = Spiky(0.1, 12.3, lambda ms: clock.spend(ms / 1000))
    timed = run({"spiky": spiky}, rounds=30).subjects["spiky"]
    assert timed.calls_per_sample == 20
    require_percentiles_of_calls(timed, spiky)


def test_percentiles_are_of_single_calls_in_visits_too(clock: FakeTime) -> None:
    """One visit, so that the last calls are the timed ones."""
    spiky = Spiky(0.1, 12.3, lambda ms: clock.spend(ms / 1000))
    timed = time_in_visits({"spiky": lambda: spiky}, visits=1, samples=30, threads=1, warmup_seconds=0.1).subjects["spiky"]
    assert timed.calls_per_sample == 20
    require_percentiles_of_calls(timed, spiky)


def test_percentiles_are_of_single_calls_on_a_gpu(clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host enqueues a whole sample and waits for it once, before and after."""
    gpu = Gpu(clock, monkeypatch)
    spiky = Spiky(0.25, 4.5, lambda ms: gpu.call(ms / 1000, 1e-5))
    warmed = 10
    timed = run({"spiky": spiky}, rounds=30, device=GPU, warmup=60).subjects["spiky"]
    assert timed.calls_per_sample == 8
    assert len(spiky.true_ms) == warmed + timed.calls
    assert gpu.waited == warmed + 2 * 30
    require_percentiles_of_calls(timed, spiky)
    assert not timed.host_bound


def test_spikes_do_not_bias_a_ratio(clock: FakeTime) -> None:
    """1.02 times in each call is a ratio of 1.02; a subject with spikes is as slow as its mean, round by round."""
    more, once = (Spiky(k * 0.1, k * 12.3, lambda ms: clock.spend(ms / 1000)) for k in (1.02, 1))
    calm = 0.95 * 0.1 * 1.003 + 0.05 * 12.3  # ms: the mean of `once`
    result = run({"more": more, "once": once, "calm": lambda: clock.spend(calm / 1000)}, rounds=40)
    assert {timed.calls_per_sample for name, timed in result.subjects.items() if name != "calm"} == {20}
    for baseline, subject, expected in (("more", "once", 1.02), ("calm", "once", 1), ("more", "calm", 1.02)):
        ratio = result.ratio(baseline, subject)
        assert (ratio.low, ratio.value, ratio.high) == pytest.approx((expected,) * 3, rel=1e-3)


@pytest.mark.parametrize(("device", "shortest_us"), [("cpu", 20), ("cuda:1", 100)])
def test_of_calls_too_short_for_the_clock_no_percentile_is_known(
    clock: FakeTime, monkeypatch: pytest.MonkeyPatch, device: str, shortest_us: int
) -> None:
    gpu = Gpu(clock, monkeypatch)

    def call(seconds: float) -> None:
        if device == "cpu":
            clock.spend(seconds)
        else:
            gpu.call(seconds, seconds / 10)

    subjects = {"long": lambda: call(1.01e-6 * shortest_us), "short": lambda: call(0.99e-6 * shortest_us)}
    result = run(subjects, device=torch.device(device))
    long, short = result.subjects["long"], result.subjects["short"]
    assert long.percentiles is not None
    assert long.percentiles.p99 == pytest.approx(1.01e-3 * shortest_us, rel=1e-3)
    assert (short.percentiles, short.quantiles_ms) == (None, None)
    assert (short.median_ms, short.mean_ms) == pytest.approx((0.99e-3 * shortest_us,) * 2, rel=1e-3)
    assert short.variation == pytest.approx(0, abs=1e-3)
    assert short.calls_per_sample == pytest.approx(2000 / shortest_us, abs=1.5)
    assert result.ratio("long", "short").value == pytest.approx(1.01 / 0.99, rel=1e-3)


@pytest.fixture
def calm(clock: FakeTime) -> TimingRun:
    return replace(run({"sparse": lambda: clock.spend(0.005)}), foreign_load=0.0)


def test_visits_warm_up_until_steady_but_no_longer_than_they_may(clock: FakeTime) -> None:
    """Two visits of three samples: ten calls to be steady, or a call above 0.05 s when times never are."""
    called: list[str] = []

    def opened(name: str, seconds: Callable[[], float]) -> Callable[[], Callable[[], object]]:
        def call() -> None:
            called.append(name)
            clock.spend(seconds())

        return lambda: call

    wild = iter(0.004 * (1 + n % 5) for n in range(10**6))
    openers = {"calm": opened("calm", lambda: 0.005), "wild": opened("wild", lambda: next(wild))}
    result = time_in_visits(openers, visits=2, samples=3, threads=1, warmup_seconds=0.1)
    assert called.count("calm") == 2 * (10 + 3)
    assert called.count("wild") <= 2 * (0.1 / 0.012 + 5 + 3)
    assert [len(timed.samples_ms) for timed in result.subjects.values()] == [6, 6]


def said(calm: TimingRun, low: float, value: float, high: float, load: float = 0.0, **flags: object) -> str:
    subject = replace(calm.subjects["sparse"], **flags)  # type: ignore[arg-type]
    result = replace(calm, subjects={"sparse": subject}, foreign_load=load)
    return verdict("sparse", "dense", Ratio(value, low, high), result, subject)


def test_verdict_is_a_sentence(calm: TimingRun) -> None:
    assert said(calm, 1.27, 1.31, 1.35) == "sparse is 1.31x faster than dense (95 % interval 1.27 to 1.35)"
    assert said(calm, 0.88, 0.91, 0.93).startswith("sparse is 1.10x slower than dense (")
    undecided = "sparse is not distinguishable from dense (95 % interval 0.98 to 1.03): "
    assert said(calm, 0.98, 1.01, 1.03) == undecided + "the difference is smaller than the noise"
    assert said(calm, 0.9, 0.96, 1.02).startswith("sparse is not distinguishable")
    assert said(calm, 1.0, 1.04, 1.08).startswith("sparse is not distinguishable")


def test_verdict_gives_the_reason_for_indecision(calm: TimingRun) -> None:
    assert "host" in said(calm, 0.98, 1.01, 1.03, host_bound=True)
    assert "other processes used 40" in said(calm, 0.98, 1.01, 1.03, load=0.4)
    assert "noise" in said(calm, 0.98, 1.01, 1.03, load=0.05)
    assert "vary" in said(calm, 0.9, 1.01, 1.1, variation=0.2)
    assert "0.2" not in said(calm, 1.27, 1.31, 1.35, variation=0.2)


def test_a_known_reason_is_told_where_nothing_disturbed_the_measurement(calm: TimingRun) -> None:
    subject = calm.subjects["sparse"]
    run_ = replace(calm, subjects={"sparse": subject})
    known = "2 of 8 layers are below the break-even sparsity"
    assert verdict("sparse", "dense", Ratio(1.0, 0.9, 1.1), run_, subject, known).endswith(f": {known}")
    shaky = replace(subject, variation=0.2)
    assert "vary" in verdict("sparse", "dense", Ratio(1.0, 0.9, 1.1), run_, shaky, known)
    assert known not in verdict("sparse", "dense", Ratio(1.3, 1.2, 1.4), run_, subject, known)


def test_verdicts_on_a_busy_machine_are_doubted(calm: TimingRun) -> None:
    for low, value, high in ((1.27, 1.31, 1.35), (0.88, 0.91, 0.93)):
        assert said(calm, low, value, high, load=0.5).endswith(
            "; doubtful, other processes used 50% of the machine: measure again"
        )
