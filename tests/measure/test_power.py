"""The fit of a power model: against another library, against devices whose coefficients are known, and its refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lpvit_cli.errors import UsageError
from lpvit_cli.measure.energy.power import Estimate, Point, PowerModel, Work, fit_power
from lpvit_cli.measure.layers import moved_bytes
from lpvit_cli.measure.profile import DeviceProfile, LayerProfile, SparseProfile

TRUTH = (0.6, 40.0, 120.0)  # pJ a multiply-add, pJ a byte, W


def calls(
    truth: tuple[float, float, float] = TRUTH,
    noise: float = 0.0,
    seed: int = 0,
    batches: tuple[int, ...] = (8, 32, 128),
    kept: tuple[float, ...] = (1.0, 0.5, 0.3),
) -> list[Point]:
    """Like a DeiT-B in bfloat16 on a GPU of 600 TFLOP/s and 3 TB/s; `noise`: of the joules, relative, normal."""
    generator = np.random.default_rng(seed)
    made = []
    for batch in batches:
        for fraction in kept:
            work = Work(round(batch * (1e9 + 16.5e9 * fraction)), round(2 * 86e6 * fraction + batch * 60e6))
            seconds = 1.3 * max(work.moved_bytes / 3e12, 2 * work.macs / 600e12) + 0.002
            joules = truth[0] * work.macs / 1e12 + truth[1] * work.moved_bytes / 1e12 + truth[2] * seconds
            made.append(Point(work, seconds, joules * (1 + noise * generator.standard_normal())))
    return made


def estimates(model: PowerModel) -> tuple[Estimate, Estimate, Estimate]:
    return model.e_mac_pj, model.e_byte_pj, model.static_w


def as_system(points: list[Point]) -> tuple[np.ndarray, np.ndarray]:
    """Terms over joules; times the coefficients they should be one."""
    terms = [(point.work.macs * 1e-12, point.work.moved_bytes * 1e-12, point.seconds) for point in points]
    return np.array(terms) / np.array([[point.joules] for point in points]), np.ones(len(points))


def test_without_noise_it_finds_the_device() -> None:
    model = fit_power(calls())
    assert [found.value for found in estimates(model)] == pytest.approx(TRUTH, rel=1e-9)
    assert model.points == 9
    assert model.largest_error < 1e-12
    assert model.joules(Work(10**12, 10**12), 2.0) == pytest.approx(0.6 + 40 + 240)


@pytest.mark.parametrize("truth", [TRUTH, (0.6, 0.0, 120.0), (0.0, 40.0, 0.0), (0.6, 40.0, 0.0)])
@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_with_scipy(truth: tuple[float, float, float], seed: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    points = calls(truth, noise=0.05, seed=seed)
    expected, _ = optimize.nnls(*as_system(points))
    assert [found.value for found in estimates(fit_power(points))] == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-9)


def test_what_a_device_does_not_pay_for_is_zero_and_never_negative() -> None:
    """Alone, the least squares of this draw would give bytes a negative price."""
    points = calls((0.6, 0.0, 120.0), noise=0.03, seed=0)
    unbounded = np.linalg.lstsq(*as_system(points), rcond=None)[0]
    assert unbounded[1] < 0
    model = fit_power(points)
    assert model.e_byte_pj.value == model.e_byte_pj.low == 0
    assert 0 < model.e_byte_pj.high < 40


def test_far_from_zero_the_interval_is_that_of_students_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    points = calls(noise=0.002)
    model = fit_power(points)
    terms, joules = as_system(points)[0] * [[p.joules] for p in points], np.array([p.joules for p in points])
    found = np.array([one.value for one in estimates(model)])
    relative = terms / (terms @ found)[:, None]
    variance = ((joules / (terms @ found) - 1) ** 2).sum() / (len(points) - 3)
    errors = stats.t.ppf(0.975, len(points) - 3) * np.sqrt(variance * np.linalg.inv(relative.T @ relative).diagonal())
    for one, error in zip(estimates(model), errors, strict=True):
        assert one.value - one.low == pytest.approx(error, rel=0.1)
        assert one.high - one.value == pytest.approx(error, rel=0.1)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 400 experiments 380 are expected, standard deviation 4.4."""
    held = np.zeros(3)
    for seed in range(400):
        model = fit_power(calls(noise=0.02, seed=seed))
        held += [one.low <= true <= one.high for one, true in zip(estimates(model), TRUTH, strict=True)]
    assert (held >= 366).all(), held
    assert (held <= 394).all(), held


def test_errors_are_those_of_its_own_points() -> None:
    points = calls(noise=0.05, seed=3)
    model = fit_power(points)
    errors = [abs(point.joules / model.joules(point.work, point.seconds) - 1) for point in points]
    assert model.median_error == pytest.approx(np.median(errors))
    assert model.largest_error == pytest.approx(max(errors))
    assert fit_power(points) == model, "nothing about it is left to chance"


@pytest.mark.parametrize(
    ("points", "told"),
    [
        (calls(batches=(8,), kept=(1.0, 0.5)), "needs 6 measured calls, these runs have 2"),
        ([dataclasses.replace(point, seconds=point.work.macs / 1e14) for point in calls()], "rise together"),
        (
            [
                dataclasses.replace(point, seconds=0.002 + point.work.macs / 1e14)
                for point in calls(batches=(128,), kept=(1.0, 0.9, 0.7, 0.5, 0.4, 0.3))
            ],
            "rise together",
        ),
    ],
    ids=["few", "time is work", "one batch size"],
)
def test_what_cannot_be_told_apart_is_refused(points: list[Point], told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        fit_power(points)
    assert "bench.batch_sizes" in caught.value.hint


# what a call moves


class Twice(nn.Module):
    """A layer called twice, with a parameter of no module's, and a Dropout and an Identity, which do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.offset = nn.Parameter(torch.zeros(8))
        self.nothing = nn.Sequential(nn.Dropout(0.5), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.nothing(self.linear(self.linear(x))) + self.offset


def test_weights_move_once_and_activations_at_every_module() -> None:
    model, x = Twice().eval(), torch.zeros(3, 8)
    assert moved_bytes(model, x) == 4 * (8 * 8 + 8 + 8) + 4 * (2 * (3 * 8 + 3 * 8))
    assert moved_bytes(model.to(torch.bfloat16), x.bfloat16()) == moved_bytes(model.float(), x) / 2
    assert not model.linear._forward_hooks


# in a profile


def test_a_profile_gets_the_energies_of_the_model_and_keeps_its_times() -> None:
    facts: dict[str, Any] = {"device": "d", "dtype": "bfloat16", "threads": 1, "model": "m", "batch_size": 2, "provenance": {}}
    sparse = SparseProfile(block=(4, 4), kept=[0.25, 1.0], ms=[1.0, 3.0], mj=None)
    layer = LayerProfile(shape=(16, 8), rows=10, bias=True, names=["a", "b"], dense_ms=2.0, dense_mj=None, sparse=[sparse])
    made = DeviceProfile(
        **facts,
        model_ms=9.0,
        model_mj=None,
        model_work=Work(macs=5000, moved_bytes=4000),
        energy_source=None,
        energy_reasons=["no meter"],
        layers=[layer],
    )
    power = PowerModel(Estimate(2e9, 0, 0), Estimate(3e9, 0, 0), Estimate(7.0, 0, 0), 6, 0.0, 0.0)
    fitted = made.with_power(power, "a fit")
    weights, activations = 16 * 8, 10 * (16 + 8)

    def mj(ms: float, macs: float, values: float) -> float:
        return 1e3 * (2e-3 * macs + 3e-3 * 2 * values) + 7 * ms  # two bytes a value

    assert fitted.model_mj == pytest.approx(1e3 * (2e-3 * 5000 + 3e-3 * 4000) + 7 * 9)
    (changed,) = fitted.layers
    assert changed.dense_mj == pytest.approx(mj(2, 10 * weights, weights + 16 + activations))
    assert changed.sparse[0].mj == pytest.approx(
        [mj(1, 10 * weights / 4, weights / 4 + 16 + activations), mj(3, 10 * weights, weights + 16 + activations)]
    )
    assert (changed.dense_ms, changed.sparse[0].ms, fitted.model_ms) == (2, [1, 3], 9)
    assert (fitted.energy_source, fitted.energy_reasons, fitted.power) == ("a fit", [], power)
    assert made.layers[0].dense_mj is None
