"""How long calls take: subjects in turn (A B C, C B A, ...) in one process, so that drift of the machine cancels in ratios."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lpvit_cli.measure.sampling import UNSTABLE, Sample, Sampling, Subject, warm_up
from lpvit_cli.measure.statistics import Percentiles, Ratio, coefficient_of_variation, paired_ratio, percentiles, quantiles

HOST_BOUND = 0.8  # share of the GPU's time spent on enqueueing above which the host is the bottleneck
BUSY = 0.1  # share of the machine used by others above which it is called busy


@dataclass(frozen=True)
class Timing:
    """One subject; milliseconds per call. `samples_ms` has one mean of `calls_per_sample` calls for each round: ratios and
    throughput come from it. Percentiles are of single calls; None: the calls are too short to be timed one by one."""

    samples_ms: list[float]
    percentiles: Percentiles | None
    mean_ms: float
    variation: float  # coefficient of variation of the calls; of the samples where single calls are not known
    calls_per_sample: int
    cpu_time_ms: float | None  # median CPU time of the thread, where one CPU thread does all the work
    host_bound: bool
    quantiles_ms: list[float] | None = None  # the 0th to the 100th percentile of the calls

    @classmethod
    def of(cls, samples: Sequence[Sample], sampling: Sampling, device: torch.device, one_thread: bool) -> Timing:
        """`one_thread`: one CPU thread does all the work."""
        samples_ms = [sample.ms for sample in samples]
        calls_ms = [ms for sample in samples for ms in sample.calls_ms or ()]
        host_ms = float(np.median([sample.host_ms for sample in samples]))
        return cls(
            samples_ms,
            percentiles(calls_ms) if calls_ms else None,
            float(np.mean(samples_ms)),
            coefficient_of_variation(calls_ms or samples_ms),
            sampling.calls,
            cpu_time_ms=host_ms if one_thread else None,
            host_bound=device.type == "cuda" and host_ms > HOST_BOUND * float(np.median(samples_ms)),
            quantiles_ms=quantiles(calls_ms) if calls_ms else None,
        )

    @property
    def median_ms(self) -> float:
        """Of the samples: known however short the calls are."""
        return float(np.median(self.samples_ms))

    @property
    def calls(self) -> int:
        """How many calls were timed, in all rounds."""
        return len(self.samples_ms) * self.calls_per_sample

    @property
    def unstable(self) -> bool:
        return self.variation > UNSTABLE


@dataclass(frozen=True)
class TimingRun:
    """All subjects of one interleaved run."""

    subjects: dict[str, Timing]
    threads: int
    foreign_load: float | None  # share of all cores' time used by other processes; None: /proc/stat cannot be read

    @property
    def busy(self) -> bool:
        """Whether others used so much of the machine that times are doubtful."""
        return self.foreign_load is not None and self.foreign_load > BUSY

    def ratio(self, baseline: str, subject: str) -> Ratio:
        """How many times faster `subject` is than `baseline`, round by round."""
        return paired_ratio(self.subjects[baseline].samples_ms, self.subjects[subject].samples_ms)


def time_interleaved(
    subjects: dict[str, Subject],
    *,
    device: torch.device,
    rounds: int,
    warmup_seconds: float,
    on_round: Callable[[int, int], None] | None = None,
) -> TimingRun:
    """Time each subject once a round, in alternating order, after warming all up. `on_round` is told rounds done and in all."""
    taken: dict[str, list[Sample]] = {name: [] for name in subjects}
    with current(device):
        samplings = {name: warm_up(subject, device, warmup_seconds) for name, subject in subjects.items()}
        before = _busy_seconds()
        for number in range(rounds):
            order = list(subjects) if number % 2 == 0 else list(reversed(subjects))
            for name in order:
                taken[name].append(samplings[name].take(subjects[name], device))
            if on_round:
                on_round(number + 1, rounds)
        after = _busy_seconds()
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    return TimingRun(
        {name: Timing.of(samples, samplings[name], device, one_thread) for name, samples in taken.items()},
        threads=torch.get_num_threads(),
        foreign_load=_foreign_load(before, after),
    )


def time_in_visits(
    opened: dict[str, Callable[[], Subject]],
    *,
    visits: int,
    samples: int,
    threads: int,
    warmup_seconds: float = 0.0,
    on_visit: Callable[[int, int], None] | None = None,
) -> TimingRun:
    """As `time_interleaved` on the CPU, for subjects that must not be alive together: sessions whose threads would disturb each
    other. Each of `opened` makes a subject, which is warmed up, sampled and let go, once a visit, in alternating order.
    `warmup_seconds`: at most, in each visit."""
    cpu = torch.device("cpu")
    taken: dict[str, list[Sample]] = {name: [] for name in opened}
    samplings: dict[str, Sampling] = {}
    before = _busy_seconds()
    for number in range(visits):
        order = list(opened) if number % 2 == 0 else list(reversed(opened))
        for place, name in enumerate(order):
            subject = opened[name]()
            again = warm_up(subject, cpu, warmup_seconds)
            sampling = samplings.setdefault(name, again)
            taken[name] += [sampling.take(subject, cpu) for _ in range(samples)]
            del subject
            if on_visit:
                on_visit(number * len(order) + place + 1, visits * len(order))
    load = _foreign_load(before, _busy_seconds())
    timings = {name: Timing.of(each, samplings[name], cpu, threads == 1) for name, each in taken.items()}
    return TimingRun(timings, threads=threads, foreign_load=load)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads, for a while; None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: on that, events and streams are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def verdict(name: str, baseline: str, ratio: Ratio, run: TimingRun, subject: Timing, otherwise: str = "") -> str:
    """One sentence: faster, slower, or not distinguishable and the likeliest reason (`otherwise`: if nothing disturbed it)."""
    interval = f"95 % interval {ratio.low:.2f} to {ratio.high:.2f}"
    busy = f"other processes used {run.foreign_load:.0%} of the machine" if run.busy else ""
    doubt = f"; doubtful, {busy}: measure again" if busy else ""
    if ratio.low > 1:
        return f"{name} is {ratio.value:.2f}x faster than {baseline} ({interval}){doubt}"
    if ratio.high < 1:
        return f"{name} is {1 / ratio.value:.2f}x slower than {baseline} (speed {ratio.value:.2f}x, {interval}){doubt}"
    if subject.host_bound:
        reason = "the host cannot feed the device fast enough; try a larger batch"
    elif busy:
        reason = busy
    elif subject.unstable:
        reason = f"its times vary by {subject.variation:.0%}; measure on a quieter machine or for more rounds"
    else:
        reason = otherwise or "the difference is smaller than the noise"
    return f"{name} is not distinguishable from {baseline} ({interval}): {reason}"


def _busy_seconds() -> tuple[float, float, float] | None:
    """Now, busy seconds of all cores since boot, busy seconds of this process."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields[:8])
    ticks = os.sysconf("SC_CLK_TCK")
    return time.monotonic(), (user + nice + system + irq + softirq + steal) / ticks, time.process_time()


def _foreign_load(before: tuple[float, float, float] | None, after: tuple[float, float, float] | None) -> float | None:
    if before is None or after is None or after[0] <= before[0]:
        return None
    elapsed, all_busy, own = (b - a for a, b in zip(before, after, strict=True))
    return min(1.0, max(0.0, (all_busy - own) / (elapsed * (os.cpu_count() or 1))))
