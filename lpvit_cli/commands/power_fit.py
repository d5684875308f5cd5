"""The power model of a device from bench reports at several sparsities, as millijoules of a device profile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from lpvit_cli.bench.results import BatchBench
from lpvit_cli.commands.compare import read_report
from lpvit_cli.errors import UsageError
from lpvit_cli.files import replace_text, writing
from lpvit_cli.measure.energy.power import Point, fit_power
from lpvit_cli.measure.energy.run import Energy
from lpvit_cli.measure.profile import DeviceProfile, named_profile
from lpvit_cli.report.schema import BenchReport


def save_profile(profile: DeviceProfile, name: str, fit: Sequence[Path]) -> tuple[DeviceProfile, Path]:
    """Keep a profile for all recipes; with bench reports or run folders to `fit`, with the energies of their power model.

    Raises what `with_fitted_power` raises, and EnvironmentFault where it cannot be written.
    """
    if fit:
        profile = with_fitted_power(profile, {run: read_report(run) for run in fit})
    path = named_profile(name)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, profile.model_dump_json(indent=1))
    return profile, path


def with_fitted_power(profile: DeviceProfile, runs: Mapping[Path, BenchReport]) -> DeviceProfile:
    """The profile with the energies of a power model that is fitted to `runs`, by where they are from.

    Raises UsageError where a run is of another device or dtype, has no energy, or all are of one sparsity.
    """
    points = []
    for path, report in runs.items():
        if report.device != profile.device:
            raise UsageError(
                f"{path} is of {report.device}, the profile of {profile.device}",
                "bench and profile on one device, a CPU with the same target.threads",
            )
        batches = [batch for batch in report.batches if batch.dtype == profile.dtype]
        if not batches:
            raise UsageError(
                f"{path} is in {', '.join(report.dtypes)}, the profile in {profile.dtype}",
                "bench and profile with the same --dtype",
            )
        found = [point for batch in batches for point in _points(batch)]
        if not found:
            reasons = [*report.energy_reasons, "it was made before bench counted multiply-adds and bytes"]
            raise UsageError(
                f"{path} has no energy of known work: {reasons[0]}", "bench again, where a meter can be read: lpvit doctor"
            )
        points += found
    if len({report.flops / report.flops_dense for report in runs.values()}) < 2:
        raise UsageError(
            "a power model needs runs of at least two sparsities, these have one",
            "bench a model pruned to another budget, and give both: --fit RUN --fit OTHER_RUN",
        )
    sources = {batch.energy.source for report in runs.values() for batch in report.batches if batch.energy}
    power = fit_power(points)
    return profile.with_power(power, f"a power model fitted to {power.points} measured calls ({'; '.join(sorted(sources))})")


def _points(batch: BatchBench) -> Iterator[Point]:
    """One for each subject with counted work."""
    energies: dict[str, Energy] = batch.energy.subjects if batch.energy else {}
    for name in batch.work.keys() & energies.keys():
        calls = [(window.images / batch.batch_size, window) for window in energies[name].windows]
        seconds = median(window.seconds / count for count, window in calls)
        yield Point(batch.work[name], seconds, energies[name].joules_per_image * batch.batch_size)
