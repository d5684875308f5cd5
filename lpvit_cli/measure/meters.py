"""Power meters: NVML's energy counter for a GPU, RAPL for Intel and AMD CPU packages. No meter, no number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
SLOWDOWN = 0x8 | 0x20 | 0x40 | 0x80  # hardware slowdown, software thermal, hardware thermal, power brake

# NVML return codes (nvml.h, nvmlReturn_t) that say why there will be no number.
NVML_REASONS = {
    3: "this GPU has no energy counter (Volta and newer have one)",
    4: "no permission to read NVML",
    6: "the GPU of this process is not visible to NVML",
    9: "the NVIDIA driver is not loaded",
    12: "NVML library not found (no NVIDIA driver here); in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    15: "the GPU was lost",
    16: "the GPU needs a reset",
    18: "driver and NVML library versions differ",
}


class MeterError(Exception):
    """A meter stopped giving numbers; the message says why."""


@dataclass(frozen=True)
class Reading:
    """The counter since some fixed time, and whether the device was slowed down."""

    energy_mj: float
    slowed_down: bool = False


class Meter(Protocol):
    source: str

    def read(self) -> Reading: ...


class NvmlMeter:
    """Energy of one GPU, found by its UUID: indices of NVML and CUDA need not agree. Settings are read, never changed."""

    def __init__(self, uuid: str, allow_fake: bool = False):
        import pynvml

        self.nvml: Any = pynvml
        self._ask(pynvml.nvmlInit)
        self.handle = self._ask(pynvml.nvmlDeviceGetHandleByUUID, uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        name = str(self._ask(pynvml.nvmlDeviceGetName, self.handle))
        driver = str(self._ask(pynvml.nvmlSystemGetDriverVersion))
        if "fake" in f"{name} {driver}".lower() and not allow_fake:
            raise MeterError(f"{name!r} is a test double, not a GPU")
        if self._mig_enabled():
            raise MeterError("the GPU is split by MIG: the board's power belongs to several users")
        self.source = f"NVML energy counter of {name}, driver {driver}"
        self.read()

    def read(self) -> Reading:
        energy = self._ask(self.nvml.nvmlDeviceGetTotalEnergyConsumption, self.handle)
        try:
            reasons = self.nvml.nvmlDeviceGetCurrentClocksEventReasons(self.handle)
        except self.nvml.NVMLError:
            reasons = 0  # older drivers cannot tell
        return Reading(float(energy), bool(reasons & SLOWDOWN))

    def _mig_enabled(self) -> bool:
        try:
            current, _pending = self.nvml.nvmlDeviceGetMigMode(self.handle)
        except self.nvml.NVMLError:
            return False  # a GPU without MIG
        return bool(current)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self.nvml.NVMLError as error:
            raise MeterError(NVML_REASONS.get(error.value, f"NVML: {error} (code {error.value})")) from error


class RaplMeter:
    """Energy of all CPU packages; whatever else runs on them is in it."""

    source = "RAPL, CPU packages"

    def __init__(self, root: Path = POWERCAP):
        if not root.is_dir():
            raise MeterError(f"RAPL: {root} absent (virtual machine?)")
        zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if self._text(zone / "name").startswith("package")]
        if not zones:
            raise MeterError(f"RAPL: no CPU package below {root}")
        self.counters = [zone / "energy_uj" for zone in zones]
        self.ranges = [int(self._text(zone / "max_energy_range_uj")) for zone in zones]
        self.last = [int(self._text(counter)) for counter in self.counters]
        self.total_uj = 0

    def read(self) -> Reading:
        now = [int(self._text(counter)) for counter in self.counters]
        steps = zip(now, self.last, self.ranges, strict=True)
        self.total_uj += sum(new - old if new >= old else new - old + wrap for new, old, wrap in steps)
        self.last = now
        return Reading(self.total_uj / 1000)

    @staticmethod
    def _text(path: Path) -> str:
        try:
            return path.read_text().strip()
        except PermissionError as error:
            raise MeterError(f"RAPL: {path} may be read by root only") from error
        except OSError as error:
            raise MeterError(f"RAPL: {path}: {error.strerror}") from error


def open_meter(device_type: str, uuid: str = "") -> tuple[Meter | None, list[str]]:
    """The meter for a device ("cuda" or "cpu"), or None and the reasons."""
    try:
        return (NvmlMeter(uuid) if device_type == "cuda" else RaplMeter()), []
    except MeterError as error:
        return None, [str(error)]
