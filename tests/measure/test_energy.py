"""Energy per image against a board whose power is known, and every way in which a meter fails."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import pytest
from synthetic import IDLE_W, Board, constant, coverage

from lpvit_cli.measure.energy.meters.base import MeterError, Reading
from lpvit_cli.measure.energy.run import EnergyRun, measure_energy, saving_verdict
from lpvit_cli.measure.statistics import Ratio


def wave(time_s: float) -> float:
    """Mean 1; periods far from a divisor of tick or call."""
    return 1 + 0.4 * math.sin(2 * math.pi * time_s / 0.073) + 0.2 * math.sin(2 * math.pi * time_s / 0.31)


def numbers(run: EnergyRun) -> list[float]:
    """Whatever the run reports of its subjects."""
    return [energy.joules_per_image for energy in run.subjects.values() if energy.joules_per_image is not None]


@pytest.mark.parametrize("shape", [constant, wave])
@pytest.mark.parametrize("call_s", [0.003, 0.017])
def test_joules_per_image_are_right_within_half_a_percent(shape: Callable[[float], float], call_s: float) -> None:
    board = Board(shape=shape)
    subjects = {"dense": lambda: board.spend(call_s, 300), "sparse": lambda: board.spend(call_s / 2, 240)}
    run = board.measure(subjects, images=8)
    # a look at the meter every 20 ms costs 0.1 ms of idle power; it is in the window, and in no call
    assert run.subjects["dense"].joules_per_image == pytest.approx(300 * call_s / 8, rel=5e-3)
    assert run.subjects["sparse"].joules_per_image == pytest.approx(240 * call_s / 2 / 8, rel=5e-3)
    assert run.subjects["dense"].average_w == pytest.approx(300, rel=0.01)
    assert run.subjects["dense"].above_idle_joules_per_image == pytest.approx((300 - IDLE_W) * call_s / 8, rel=7e-3)
    assert run.idle_w == pytest.approx(IDLE_W, rel=0.01)
    ratio = run.ratio("dense", "sparse")
    assert ratio is not None
    assert ratio.value == pytest.approx(2 * 300 / 240, rel=5e-3)
    assert ratio.low <= ratio.value <= ratio.high
    assert run.reasons == []
    json.dumps(asdict(run))


@pytest.mark.parametrize("seen", [0.25, 1.0])
def test_a_sensor_that_sees_a_part_of_every_tick_is_right_over_ten_seconds(seen: float) -> None:
    """A100 and H100 are told to sample 25 % of the time; what flickers is then known from a sample."""
    board = Board(shape=wave, seen=seen)
    run = board.measure({"dense": lambda: board.spend(0.005, 300)})
    spent = 300 * 0.005 / 8
    assert run.subjects["dense"].joules_per_image == pytest.approx(spent, rel=5e-3)
    assert run.subjects["dense"].agreement == "good"


@pytest.mark.parametrize(("gain", "agreement"), [(0.98, "good"), (1.05, "fair"), (0.85, "inconsistent")])
def test_counter_and_trace_are_compared(gain: float, agreement: str) -> None:
    board = Board(power_gain=gain)
    run = board.measure({"dense": lambda: board.spend(0.005, 300)})
    dense = run.subjects["dense"]
    assert dense.agreement == agreement
    assert dense.trace_joules_per_image == pytest.approx(gain * dense.joules_per_image, rel=0.01)
    assert (agreement == "inconsistent") == any("are inconsistent" in note for note in run.notes)
    assert dense.peak_w == pytest.approx(gain * 300, rel=0.01)


def test_a_trace_that_breaks_off_leaves_the_energy_and_says_so() -> None:
    board = Board(power_fails_at=40.0)
    run = board.measure({"dense": lambda: board.spend(0.005, 300)})
    dense = run.subjects["dense"]
    assert dense.joules_per_image == pytest.approx(300 * 0.005 / 8, rel=5e-3)
    assert (dense.agreement, dense.trace_joules_per_image) == (None, None)
    assert run.notes == ["the power trace broke off: the sensor is gone"]


def test_windows_lie_within_their_trace_and_never_overlap() -> None:
    board = Board()
    run = board.measure({"dense": lambda: board.spend(0.02, 300), "sparse": lambda: board.spend(0.01, 200)})
    windows = sorted((w for energy in run.subjects.values() for w in energy.windows), key=lambda w: w.begin_s)
    assert len(windows) == 12
    assert all(a.end_s < b.begin_s for a, b in itertools.pairwise(windows))
    for name, watts in (("dense", 300), ("sparse", 200)):
        energy = run.subjects[name]
        assert len(energy.trace.seconds) <= 2000
        for window in energy.windows:
            inside = [
                w
                for s, w in zip(energy.trace.seconds, energy.trace.watts, strict=True)
                if window.begin_s + 1 < s < window.end_s
            ]
            assert inside
            assert max(inside) == pytest.approx(watts, rel=0.01)


def test_energy_delay_is_joules_times_the_latency_of_the_call() -> None:
    board = Board()
    dense = board.measure({"dense": lambda: board.spend(0.02, 300)}, images=8).subjects["dense"]
    assert dense.energy_delay_js == pytest.approx(300 * 0.02 / 8 * 0.02, rel=0.02)
    assert dense.images_per_joule == pytest.approx(8 / (300 * 0.02), rel=5e-3)


def test_a_load_that_never_settles_is_measured_and_said_to_be_unsteady() -> None:
    board = Board(mhz=lambda time_s: 1000 + 500 * (int(time_s) % 2))
    run = board.measure({"dense": lambda: board.spend(0.005, 300)})
    assert any("had not settled before 6 of 6 windows" in note for note in run.notes)
    steady = Board(mhz=lambda time_s: 1500.0)
    assert steady.measure({"dense": lambda: steady.spend(0.005, 300)}).notes == []


def test_windows_grow_with_a_slow_counter() -> None:
    """At least a hundred ticks for the default of ten seconds."""
    board = Board(tick_s=0.3)
    windows = board.measure({"dense": lambda: board.spend(0.005, 300)}).subjects["dense"].windows
    assert all(window.seconds >= 29.9 for window in windows)


def test_the_interval_covers_the_truth() -> None:
    """Power differs from trial to trial; of 300 experiments 291 are expected (six pairs: 96.9 %), standard deviation 3."""
    assert 282 <= 300 * coverage(300, tick_s=0.02, window_s=0.4) <= 299


def test_a_saving_is_one_only_if_its_interval_excludes_one() -> None:
    board = Board()
    run = board.measure({"dense": lambda: board.spend(0.02, 300), "sparse": lambda: board.spend(0.01, 300)})
    assert "sparse saves energy: an image takes 2.00x less than dense" in saving_verdict(
        "sparse", "dense", run, Ratio(2.0, 1.9, 2.1)
    )
    assert "no energy that can be told from noise" in saving_verdict("sparse", "dense", run, Ratio(1.02, 0.98, 1.05))
    assert "takes 1.25x more energy than dense" in saving_verdict("sparse", "dense", run, Ratio(0.8, 0.7, 0.9))
    off = Board(power_gain=1.5)
    run = off.measure({"dense": lambda: off.spend(0.02, 300), "sparse": lambda: off.spend(0.01, 300)})
    assert "doubtful" in saving_verdict("sparse", "dense", run, Ratio(2.0, 1.9, 2.1))


def test_a_slow_counter_gets_windows_of_many_calls() -> None:
    board = Board(fewest_calls=32)
    windows = board.measure({"dense": lambda: board.spend(0.7, 300)}).subjects["dense"].windows
    assert all(window.images >= 32 * 8 for window in windows)
    board = Board(tick_s=0.001)  # RAPL: right after one call as after many
    windows = board.measure({"dense": lambda: board.spend(0.7, 300)}).subjects["dense"].windows
    assert all(window.seconds < 12 for window in windows)


def test_idle_is_measured_before_power_is_polled() -> None:
    board = Board()
    polled: list[float] = []
    power_w = board.power_w
    board.power_w = lambda: (polled.append(board.now), power_w())[1]  # type: ignore[method-assign]
    board.measure({"dense": lambda: board.spend(0.005, 300)})
    assert polled[0] >= 10
    assert polled[-1] - polled[0] == pytest.approx(0.05 * (len(polled) - 1), rel=0.01)


def test_a_board_without_power_readings_has_no_trace() -> None:
    board = Board(power_source=None)
    dense = board.measure({"dense": lambda: board.spend(0.005, 300)}).subjects["dense"]
    assert (dense.agreement, dense.trace, dense.peak_w) == (None, None, None)
    assert dense.joules_per_image == pytest.approx(300 * 0.005 / 8, rel=5e-3)


def test_added_up_power_is_no_check_of_itself() -> None:
    board = Board(has_counter=False)
    dense = board.measure({"dense": lambda: board.spend(0.005, 300)}).subjects["dense"]
    assert dense.agreement is None
    assert dense.trace is not None


def test_a_window_at_the_power_limit_is_valid_and_said() -> None:
    board = Board(capped=True)
    run = board.measure({"dense": lambda: board.spend(0.005, 300)})
    assert run.subjects["dense"].windows[0].power_capped
    assert any("at the power limit in 6 of 6 windows" in note for note in run.notes)


def test_a_load_warms_up_for_half_a_window_and_until_its_clock_settles() -> None:
    board = Board(mhz=lambda time_s: 1980 - 480 * min(1.0, time_s / 20))  # falls by more than 2 % in three looks, for 20 s
    run = board.measure({"dense": lambda: board.spend(0.005, 300)})
    begins = [window.begin_s for window in run.subjects["dense"].windows]
    assert 21 <= begins[0] <= 25, "idle until 10, cool-down until 11; half a window would have been over by 16"
    assert begins[1] - begins[0] == pytest.approx(10 + 1 + 5, abs=0.5)
    assert run.notes == []


def test_the_device_cools_down_between_turns() -> None:
    board = Board()
    loads: list[tuple[float, float]] = []

    def call() -> None:
        begin = board.now
        board.spend(0.02, 300)
        loads.append((begin, board.now))

    board.measure({"dense": call})
    pauses = [after[0] - before[1] for before, after in itertools.pairwise(loads)]
    assert sum(pause > 0.5 for pause in pauses) == 5
    assert max(pauses) == pytest.approx(1.0, rel=0.05)


def test_a_load_that_was_hot_is_measured_again_and_that_is_told() -> None:
    board = Board()

    def call() -> None:
        board.slow_until = 20.0
        board.spend(0.005, 300)

    run = board.measure({"dense": call})
    assert run.reasons == []
    assert run.subjects["dense"].windows[0].begin_s >= 25
    assert any("1 windows were measured again: the device was slowed down" in note for note in run.notes)


def test_trials_go_there_and_back_after_an_idle_window() -> None:
    board = Board()
    log: list[tuple[str, float]] = []

    def subject(name: str) -> Callable[[], None]:
        def call() -> None:
            log.append((name, board.now))
            board.spend(0.02, 300)

        return call

    board.measure({name: subject(name) for name in "AB"}, window_s=2.0)
    order = [name for n, (name, _) in enumerate(log) if n == 0 or log[n - 1][0] != name]
    assert "".join(order) == "ABABABA"  # A BB AA BB AA BB A
    assert log[0][1] >= 2.0


def test_a_window_under_ten_ticks_is_refused_naming_the_tick() -> None:
    board = Board()
    run = board.measure({"dense": lambda: board.spend(0.005, 300)}, window_s=0.5)
    assert numbers(run) == []
    assert re.search(r"ticks.* (99|10[01]) ms", run.reasons[0])
    assert board.measure({"dense": lambda: board.spend(0.005, 300)}, window_s=0.95).reasons != []
    assert board.measure({"dense": lambda: board.spend(0.005, 300)}, window_s=1.05).reasons == []


def test_a_hot_window_is_repeated() -> None:
    board = Board(slow_until=12.0)  # the idle window, and only the first one, is hot
    run = board.measure({"dense": lambda: board.spend(0.005, 300)})
    assert run.reasons == []
    assert run.idle_w == pytest.approx(IDLE_W, rel=0.02)
    assert run.subjects["dense"].joules_per_image == pytest.approx(300 * 0.005 / 8, rel=5e-3)


def test_a_window_that_was_hot_for_a_part_of_it_is_repeated() -> None:
    board = Board(slow_until=5.0)
    begun: list[float] = []

    def call() -> None:
        begun.append(board.now)
        board.spend(0.005, 300)

    assert board.measure({"dense": call}).reasons == []
    assert begun[0] >= 20  # two idle windows of 10 s


def test_work_is_waited_for_before_the_counter_is_read_and_trials_are_told() -> None:
    """Calls only queue work, as on a GPU; it is done, and its energy spent, when someone synchronises."""
    board = Board()
    queued = [0]
    told: list[tuple[int, int]] = []

    def call() -> None:
        queued[0] += 1

    def synchronize() -> None:
        board.spend(0.005 * queued[0], 300)
        queued[0] = 0

    run = measure_energy(
        {"dense": call},
        8,
        board,
        trials=6,
        window_s=10.0,
        synchronize=synchronize,
        on_trial=lambda done, total: told.append((done, total)),
        clock=board.clock,
        sleep=board.sleep,
    )
    assert run.reasons == []
    assert run.subjects["dense"].joules_per_image == pytest.approx(300 * 0.005 / 8, rel=5e-3)
    assert told == [(n, 6) for n in range(1, 7)]


def test_work_of_the_caller_is_not_in_the_idle_window() -> None:
    """What was queued before measuring is finished first."""
    board = Board()
    queued = [30.0]

    def synchronize() -> None:
        board.spend(queued[0], 300)
        queued[0] = 0.0

    def sleep(seconds: float) -> None:
        assert queued == [0.0], "the idle window began while work was under way"
        board.sleep(seconds)

    load = {"dense": lambda: board.spend(0.005, 300)}
    run = measure_energy(load, 8, board, trials=6, window_s=10.0, synchronize=synchronize, clock=board.clock, sleep=sleep)
    assert run.idle_w == pytest.approx(IDLE_W, rel=0.02)


def test_fewer_trials_than_an_interval_needs_give_energy_and_no_ratio() -> None:
    board = Board()
    run = board.measure({name: lambda: board.spend(0.005, 300) for name in ("dense", "sparse")}, trials=5)
    assert run.subjects["dense"].joules_per_image == pytest.approx(300 * 0.005 / 8, rel=5e-3)
    with pytest.raises(ValueError, match="needs at least 6 pairs, got 5"):
        run.ratio("dense", "sparse")


def test_a_board_that_stays_hot_has_no_energy_after_four_windows() -> None:
    board = Board(slow_until=math.inf)
    run = board.measure({"dense": lambda: board.spend(0.005, 300)})
    assert numbers(run) == []
    assert "slow" in run.reasons[0]
    assert "4" in run.reasons[0]
    assert 4 * 10 < board.now < 4 * 10 + 60


class Resetting(Board):
    """The counter starts anew once, in the middle of the first window."""

    def read(self) -> Reading:
        reading = super().read()
        if self.now > 5 and not self.__dict__.setdefault("reset", False):
            self.joules, self.shown_mj, self.reset = -1e6, 0, True
            return super().read()
        return reading


def test_a_counter_that_runs_backwards_is_never_reported() -> None:
    board = Resetting()
    run = board.measure({"dense": lambda: board.spend(0.005, 300)})
    assert board.reset
    assert run.reasons == []
    assert run.idle_w == pytest.approx(IDLE_W, rel=0.02)
    assert run.subjects["dense"].joules_per_image == pytest.approx(300 * 0.005 / 8, rel=5e-3)


def test_zero_joules_are_never_reported() -> None:
    board = Board(tick_s=math.inf)
    run = board.measure({"dense": lambda: board.spend(0.005, 300)})
    assert numbers(run) == []
    assert run.idle_w is None
    assert "counter" in run.reasons[0]


class Dying(Board):
    def read(self) -> Reading:
        if self.now > 60:
            raise MeterError("NVML: GPU is lost (code 15)")
        return super().read()


def test_a_meter_that_dies_leaves_its_code_and_no_number() -> None:
    board = Dying()
    run = board.measure({"dense": lambda: board.spend(0.005, 300)})
    assert numbers(run) == []
    assert run.reasons == ["NVML: GPU is lost (code 15)"]


def test_energy_does_not_load_torch() -> None:
    code = "import sys, lpvit_cli.measure.energy.run, lpvit_cli.measure.energy.meters.nvml; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
