"""RAPL: the energy counters of Intel and AMD CPU packages."""

from __future__ import annotations

from pathlib import Path

from lpvit_cli.measure.energy.meters.base import Meter, MeterError, Reading

POWERCAP = Path("/sys/class/powercap")


class RaplMeter(Meter):
    """Energy of all CPU packages; whatever else runs on them is in it."""

    devices = ("cpu",)
    source = "RAPL, CPU packages"

    @classmethod
    def open(cls, uuid: str, allow_mig: bool) -> RaplMeter:
        return cls()

    def __init__(self, root: Path = POWERCAP):
        if not root.is_dir():
            raise MeterError(f"RAPL: {root} absent (virtual machine?)")
        zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if _text(zone / "name").startswith("package")]
        if not zones:
            raise MeterError(f"RAPL: no CPU package below {root}")
        self.counters = [zone / "energy_uj" for zone in zones]
        self.ranges = [_number(zone / "max_energy_range_uj") for zone in zones]
        self.last = [_number(counter) for counter in self.counters]
        self.total_uj = 0

    def read(self) -> Reading:
        now = [_number(counter) for counter in self.counters]
        steps = zip(now, self.last, self.ranges, strict=True)
        self.total_uj += sum(new - old if new >= old else new - old + wrap for new, old, wrap in steps)
        self.last = now
        return Reading(self.total_uj / 1000)

    def facts(self) -> dict[str, str | float | None]:
        return {"packages": len(self.counters)}

    def notes(self) -> list[str]:
        return ["RAPL counts whole CPU packages: whatever else runs on them is in the joules"]


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except PermissionError as error:
        raise MeterError(f"RAPL: {path} may be read by root only") from error
    except OSError as error:
        raise MeterError(f"RAPL: {path}: {error.strerror}") from error


def _number(path: Path) -> int:
    text = _text(path)
    if not text.isdecimal():
        raise MeterError(f"RAPL: {path}: not a number: {text!r}")
    return int(text)
