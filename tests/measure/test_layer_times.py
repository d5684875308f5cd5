"""Times of layers within a model, under a clock that only the layers move; and the roofline."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lpvit_cli.measure import layers
from lpvit_cli.measure.layers import PASS, LayerWatch, Traffic, watch_in_turn
from lpvit_cli.measure.roofline import Ceilings


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(layers, "time", fake)
    return fake


class Slow(nn.Linear):
    """Takes `seconds` on the clock; adds a residual if there is one."""

    def __init__(self, clock: Clock, seconds: float, columns: int, out: int):
        super().__init__(columns, out)
        self.clock, self.seconds = clock, seconds

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.clock.now += self.seconds
        y = super().forward(x)
        return y if residual is None else y + residual


class Model(nn.Module):
    """`first` once, `second` twice, and a millisecond beside."""

    def __init__(self, clock: Clock, trace: list[str] | None = None, name: str = ""):
        super().__init__()
        self.clock, self.name, self.trace = clock, name, trace if trace is not None else []
        self.first, self.second = Slow(clock, 0.002, 8, 16), Slow(clock, 0.003, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.trace.append(self.name)
        self.clock.now += 0.001
        x = self.first(x)
        return self.second(self.second(x), residual=x)


def watch(model: Model) -> LayerWatch:
    return LayerWatch(model, {"first": model.first, "second": model.second}, torch.zeros(5, 4, 8))


def test_each_layer_has_its_time_and_the_whole_has_all(clock: Clock) -> None:
    watched = watch(Model(clock))
    watched.take()
    watched.take()
    assert watched.samples_ms["first"] == pytest.approx([2, 2])
    assert watched.samples_ms["second"] == pytest.approx([6, 6]), "called twice in a pass"
    assert watched.samples_ms[PASS] == pytest.approx([9, 9])


def test_traffic_is_what_is_read_and_written_once(clock: Clock) -> None:
    model = Model(clock)
    watched = watch(model)
    watched.take()
    rows, first = 20, 4 * (20 * 8 + 20 * 16 + 16 * 8 + 16)
    assert watched.traffic["first"] == Traffic(rows, first)
    with_residual = LayerWatch(model, {"second": model.second}, torch.zeros(5, 4, 8))
    handle = model.second.register_forward_pre_hook(lambda *given: (given[1], {"residual": given[1][0]}), with_kwargs=True)
    with_residual.take()
    handle.remove()
    assert with_residual.traffic["second"].moved_bytes == 4 * (3 * 20 * 16 + 16 * 16 + 16)


def test_models_take_turns_and_warming_up_is_forgotten(clock: Clock) -> None:
    trace: list[str] = []
    watches = [watch(Model(clock, trace, name)) for name in "AB"]
    told: list[tuple[int, int]] = []
    watch_in_turn(watches, 4, lambda done, total: told.append((done, total)))
    assert "".join(trace) == "ABBA" * 3
    assert told == [(n, 4) for n in (1, 2, 3, 4)]
    assert all(len(taken) == 4 for watched in watches for taken in watched.samples_ms.values())


def test_hooks_are_gone_afterwards(clock: Clock) -> None:
    model = Model(clock)
    watched = watch(model)
    watched.take()
    model(torch.zeros(5, 4, 8))
    assert len(watched.samples_ms["first"]) == 1
    model.second.seconds = math.nan

    def fail(*_: object) -> None:
        raise RuntimeError("as if out of memory")

    model.second.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="as if"):
        watched.take()
    assert not model.first._forward_hooks
    assert not model._forward_pre_hooks


def test_on_a_gpu_events_are_read_after_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events tell a queue's time: here every record is half a millisecond after the one before."""
    recorded: list[int] = []
    synchronized: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(recorded)
            recorded.append(self.at)

        def elapsed_time(self, other: Event) -> float:
            assert synchronized, "not before the pass is over"
            return 0.5 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: synchronized.append(len(recorded)))
    watched = watch(Model(Clock()))
    watched.gpu = True
    watched.take()
    assert synchronized == [8]
    assert watched.samples_ms == {PASS: [3.5], "first": [0.5], "second": [1.0]}


def test_the_roofline_is_the_slower_of_arithmetic_and_traffic() -> None:
    ceilings = Ceilings(flops=2e12, bandwidth=1e11)
    assert ceilings.least_ms(4e9, 1e6) == pytest.approx(2.0)
    assert ceilings.least_ms(4e6, 1e9) == pytest.approx(10.0)


def test_ceilings_are_of_this_device() -> None:
    measured = Ceilings.measure(torch.device("cpu"), torch.float32)
    assert 1e9 < measured.flops < 1e15
    assert 1e8 < measured.bandwidth < 1e13
