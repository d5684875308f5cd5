"""Times and energies made by hand."""

from __future__ import annotations

from dataclasses import replace

from lpvit_cli.measure.energy.run import Energy, EnergyRun
from lpvit_cli.measure.statistics import percentiles, quantiles
from lpvit_cli.measure.timing import Timing

NVML = "NVML energy counter of NVIDIA H200, driver 570.124.06"
FACTORS = {"dense": 1.0, "masked-dense": 1.01, "sparse": 0.75}  # times and energies relative to dense


def timed(milliseconds: float) -> Timing:
    samples = [milliseconds * (1 + 0.001 * k) for k in range(30)]
    return Timing(
        samples,
        percentiles(samples),
        sum(samples) / 30,
        0.009,
        1,
        cpu_time_ms=None,
        host_bound=False,
        quantiles_ms=quantiles(samples),
    )


def averaged(milliseconds: float) -> Timing:
    """Of calls too short to be timed one by one."""
    return replace(timed(milliseconds), mean_ms=1.1 * milliseconds, percentiles=None, quantiles_ms=None, calls_per_sample=200)


def metered(joules: float) -> Energy:
    return Energy(joules, 0.8 * joules, average_w=412.3, trials_joules_per_image=[joules * (1 + 0.001 * k) for k in range(8)])


def energy_run(joules: float) -> EnergyRun:
    return EnergyRun(NVML, 71.5, {name: metered(joules * factor) for name, factor in FACTORS.items()})
