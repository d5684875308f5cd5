"""What the terminal shows of a device profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lpvit_cli.measure.energy.power import Estimate
from lpvit_cli.measure.profile import KEPT, DeviceProfile, LayerProfile, SparseProfile
from lpvit_cli.numbers import by, three_digits
from lpvit_cli.report.schema import ProfileReport
from lpvit_cli.report.terminal.cells import table


def profile(report: ProfileReport, folder: Path) -> list[Any]:
    profile = report.profile
    whole = f"whole model {three_digits(profile.model_ms)} ms, {three_digits(profile.rest_ms)} ms outside these layers"
    shown: list[Any] = [
        Text(f"{profile.model} on {profile.device}, {profile.dtype}, batch {profile.batch_size}: {whole}", "bold"),
        _curves("ms per call, times faster than dense; by blocks kept (to the nearest block)", profile, "ms"),
        *(_break_even(layer, sparse) for layer in profile.layers for sparse in layer.sparse),
    ]
    if profile.model_mj is not None and profile.rest_mj is not None:
        whole = f"{three_digits(profile.model_mj)} mJ, {three_digits(profile.rest_mj)} mJ outside these layers"
        shown.append(f"energy by {profile.energy_source}: whole model {whole}")
        shown.append(_curves("mJ per call, times less than dense; by blocks kept (to the nearest block)", profile, "mj"))
    reasons = [f"energy   not measured: {reason}" for reason in profile.energy_reasons]
    return [*shown, *reasons, f"profile: {folder / 'profile.json'}"]


def power_lines(profile: DeviceProfile) -> list[str]:
    """The power model of a profile, and what it makes of the model."""
    power = profile.power
    if power is None or profile.model_mj is None or profile.rest_mj is None:
        return []
    terms = (("multiply-add", power.e_mac_pj, "pJ"), ("byte moved", power.e_byte_pj, "pJ"), ("static", power.static_w, "W"))
    return [
        f"energy by {profile.energy_source}",
        *(f"  {what:<12} {_estimate(found, unit)}" for what, found, unit in terms),
        f"  error of the fit {power.median_error:.1%} (median), {power.largest_error:.1%} at most; by it the whole model takes "
        f"{three_digits(profile.model_mj)} mJ, {three_digits(profile.rest_mj)} mJ outside these layers",
    ]


def _estimate(found: Estimate, unit: str) -> str:
    value, low, high = (three_digits(number) for number in (found.value, found.low, found.high))
    return f"{value} {unit} (95 % interval {low} to {high})"


def _curves(title: str, profile: DeviceProfile, unit: str) -> Table:
    """A row for each shape and block; each measured fraction in the column it is nearest to (few blocks leave some empty)."""
    rows = table(title, "out x in", "dense", *(f"{100 * kept:.0f} %" for kept in KEPT))
    for layer in profile.layers:
        for sparse in layer.sparse:
            dense = getattr(layer, f"dense_{unit}")
            cells = dict.fromkeys(KEPT, "")
            for kept, cost in zip(sparse.kept, getattr(sparse, unit), strict=True):
                nearest = min(KEPT, key=lambda column: abs(column - kept))
                cells[nearest] = f"{three_digits(cost)}\n{dense / cost:.2f}x"
            label = f"{len(layer.names)} of {by(layer.shape)}\n{layer.rows} rows, blocks {by(sparse.block)}"
            rows.add_row(label, three_digits(dense), *cells.values())
    return rows


def _break_even(layer: LayerProfile, sparse: SparseProfile) -> str:
    kept = sparse.break_even(layer.dense_ms)
    if kept is None:
        pays = f"never pays, not even with {100 * sparse.kept[0]:.0f} % kept"
    elif kept == 1:
        pays = "pays even with all blocks kept"
    else:
        pays = f"pays below {100 * kept:.0f} % kept"
    return f"{by(layer.shape)} on {layer.rows} rows, blocks {by(sparse.block)}: sparse {pays}"
