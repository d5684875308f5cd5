"""Power meters: NVML for a GPU (nvml.py), RAPL for Intel and AMD CPU packages. No meter, no number."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

POWERCAP = Path("/sys/class/powercap")


class MeterError(Exception):
    """A meter gives no numbers, or stopped giving them; the message says why."""


@dataclass(frozen=True)
class Reading:
    """The counter since some fixed time, and what held the device back at that moment."""

    energy_mj: float
    slowed_down: bool = False  # by heat or a power brake: not how the device is meant to run
    power_capped: bool = False  # by its power limit: how it is meant to run


@dataclass(frozen=True)
class State:
    """None: cannot be read."""

    clock_mhz: float | None = None
    temperature_c: float | None = None


class Meter(Protocol):
    """All but `power_w` is called from one thread. Settings of devices are read, never changed."""

    source: str  # of the joules
    has_counter: bool  # else joules are powers, added up
    power_source: str | None  # of `power_w`; None: there is no power reading
    fewest_calls: int  # in a window, for a counter slow enough to be read in the middle of one

    def read(self) -> Reading:
        """Raises MeterError."""

    def power_w(self) -> float:
        """Raises MeterError."""

    def state(self) -> State: ...

    def facts(self) -> dict[str, str | float | None]:
        """What the device is and how it is set."""

    def notes(self) -> list[str]:
        """What a reader of the numbers should know."""


class RaplMeter:
    """Energy of all CPU packages; whatever else runs on them is in it."""

    source = "RAPL, CPU packages"
    has_counter = True
    power_source: str | None = None
    fewest_calls = 1  # the counter moves every millisecond

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

    def power_w(self) -> float:
        raise MeterError("RAPL has no power reading")

    def state(self) -> State:
        return State()

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


def open_meter(device_type: str, uuid: str = "", allow_mig: bool = False) -> tuple[Meter | None, list[str]]:
    """The meter for a device ("cuda" or "cpu"), or None and the reasons."""
    from lpvit_cli.measure.nvml import NvmlMeter

    try:
        return (NvmlMeter(uuid, allow_mig=allow_mig) if device_type == "cuda" else RaplMeter()), []
    except MeterError as error:
        return None, [str(error)]
