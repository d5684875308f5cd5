"""RAPL on a made-up /sys/class/powercap."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpvit_cli.measure.energy import meters
from lpvit_cli.measure.energy.meters.base import MeterError
from lpvit_cli.measure.energy.meters.rapl import RaplMeter

RANGE_UJ = 262_143_328_850


def zone(root: Path, folder: str, name: str, energy_uj: int) -> Path:
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    return path / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages; and parts, copies and the whole platform, which must not be counted again."""
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 5_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 1)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:0:1", "dram", 1)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def test_packages_add_up_and_nothing_is_counted_twice(powercap: Path) -> None:
    meter = RaplMeter(powercap)
    before = meter.read().energy_mj
    for folder in ("intel-rapl:2", "intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl-mmio:0"):
        (powercap / folder / "energy_uj").write_text("999999999")
    (powercap / "intel-rapl:0" / "energy_uj").write_text("3000000")
    (powercap / "intel-rapl:1" / "energy_uj").write_text("5500000")
    assert meter.read().energy_mj - before == pytest.approx(2000 + 500)


@given(st.lists(st.integers(0, RANGE_UJ - 1), min_size=1, max_size=20), st.integers(0, RANGE_UJ - 1))
def test_counters_that_wrap_around_lose_nothing(steps: list[int], start: int) -> None:
    with TemporaryDirectory() as folder:
        counter = zone(Path(folder), "intel-rapl:0", "package-0", start)
        meter = RaplMeter(Path(folder))
        before = meter.read().energy_mj
        for total in itertools.accumulate(steps):
            counter.write_text(str((start + total) % RANGE_UJ))
            reading = meter.read()
        assert reading.energy_mj - before == pytest.approx(sum(steps) / 1000, abs=1e-3)


def test_a_machine_without_powercap_says_so(tmp_path: Path) -> None:
    with pytest.raises(MeterError, match=r"RAPL: .*missing absent \(virtual machine\?\)"):
        RaplMeter(tmp_path / "missing")


def test_a_machine_without_packages_says_so(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "psys", 1)
    with pytest.raises(MeterError, match="RAPL: no .*package"):
        RaplMeter(tmp_path)


def test_counters_that_only_root_may_read_say_so(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, so the refusal is made up."""
    opened = io.open

    def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).endswith("energy_uj"):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(MeterError, match=r"RAPL: .*energy_uj.* root"):
        RaplMeter(powercap)


def test_a_counter_that_disappears_is_a_dead_meter(powercap: Path) -> None:
    meter = RaplMeter(powercap)
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    with pytest.raises(MeterError, match="RAPL"):
        meter.read()


def test_open_meter_gives_a_meter_or_reasons(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise MeterError("RAPL: why")

    monkeypatch.setattr(RaplMeter, "open", lambda *args: "the meter")
    assert meters.open_meter("cpu", "") == ("the meter", [])
    monkeypatch.setattr(RaplMeter, "open", refuse)
    assert meters.open_meter("cpu", "") == (None, ["RAPL: why"])
