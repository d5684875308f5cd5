"""Energy per image against a board whose power is known, and every way in which a meter fails."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import pytest
from synthetic import IDLE_W, Board, constant

from lpvit_cli.measure.energy import EnergyRun, measure_energy
from lpvit_cli.measure.meters import MeterError, Reading


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
    code = "import sys, lpvit_cli.measure.energy, lpvit_cli.measure.meters; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
