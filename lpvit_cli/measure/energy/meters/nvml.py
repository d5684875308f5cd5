"""NVML's energy counter and power readings of one GPU; without a counter, its power readings added up.

Names and codes are those of nvml.h (https://docs.nvidia.com/deploy/nvml-api).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lpvit_cli.measure.energy.meters.base import Meter, MeterError, Reading, State

SLOWDOWN = 0x8 | 0x20 | 0x40 | 0x80  # hardware slowdown, software thermal, hardware thermal, power brake
POWER_CAP = 0x4
NOT_SUPPORTED, FUNCTION_NOT_FOUND = 3, 13
COUNTER = "nvmlDeviceGetTotalEnergyConsumption"
INSTANT, AVERAGE = "NVML_FI_DEV_POWER_INSTANT", "nvmlDeviceGetPowerUsage"


# NVML return codes (nvmlReturn_t) that say why there will be no number.
NVML_REASONS = {
    3: "this GPU does not support it",
    4: "no permission to read NVML",
    6: "the GPU of this process is not visible to NVML",
    9: "the NVIDIA driver is not loaded",
    10: "the GPU did not answer in time",
    12: "NVML library not found (no NVIDIA driver here); in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    15: "the GPU was lost",
    16: "the GPU needs a reset",
    18: "driver and NVML library versions differ",
}
MIG = "the GPU is split by MIG: the board's power belongs to all its instances"


class NvmlError(MeterError):
    def __init__(self, function: str, code: int, said: object):
        super().__init__(f"{NVML_REASONS.get(code, said)} ({function}: NVML code {code})")
        self.code = code


class NvmlMeter(Meter):
    """A GPU by its UUID: indices of NVML and CUDA need not agree. `clock` is that of added-up power."""

    devices = ("cuda",)
    fewest_calls = 32

    @classmethod
    def open(cls, uuid: str, allow_mig: bool) -> NvmlMeter:
        return cls(uuid, allow_mig=allow_mig)

    def __init__(
        self, uuid: str, allow_mig: bool = False, allow_fake: bool = False, clock: Callable[[], float] = time.monotonic
    ):
        import pynvml

        self.nvml: Any = pynvml
        self.clock = clock
        self._ask("nvmlInit")
        self.handle = self._find(uuid.removeprefix("GPU-"))
        name, driver = str(self._ask("nvmlDeviceGetName", self.handle)), str(self._ask("nvmlSystemGetDriverVersion"))
        if "fake" in f"{name} {driver}".lower() and not allow_fake:
            raise MeterError(f"{name!r} is a test double, not a GPU")
        self.split = bool((self._told("nvmlDeviceGetMigMode", self.handle) or [False])[0])
        if self.split and not allow_mig:
            raise MeterError(f"{MIG} (--allow-mig measures it all the same)")
        self.power_source = next((source for source in (INSTANT, AVERAGE) if self._reads(source)), None)
        self.has_counter = self._finds_counter()
        kind = "NVML energy counter" if self.has_counter else f"power-integration ({self.power_source})"
        self.source = f"{kind} of {name}, driver {driver}"
        self.held_w, self.held_since, self.added_mj = 0.0, clock(), 0.0
        self.read()

    def read(self) -> Reading:
        reasons = self._told("nvmlDeviceGetCurrentClocksEventReasons", self.handle) or 0
        counter_mj = self._ask(COUNTER, self.handle) if self.has_counter else self._add_up()
        return Reading(float(counter_mj), bool(reasons & SLOWDOWN), bool(reasons & POWER_CAP))

    def power_w(self) -> float:
        return self._power_mw(self.power_source) / 1000

    def state(self) -> State:
        temperature = self._told("nvmlDeviceGetTemperature", self.handle, self.nvml.NVML_TEMPERATURE_GPU)
        return State(self._told("nvmlDeviceGetClockInfo", self.handle, self.nvml.NVML_CLOCK_SM), temperature)

    def facts(self) -> dict[str, str | float | None]:
        limit_mw = self._told("nvmlDeviceGetEnforcedPowerLimit", self.handle)
        state, memory = self.state(), self.nvml.NVML_CLOCK_MEM
        return {
            "name": self._told("nvmlDeviceGetName", self.handle),
            "driver": self._told("nvmlSystemGetDriverVersion"),
            "nvml": self._told("nvmlSystemGetNVMLVersion"),
            "power_limit_w": None if limit_mw is None else limit_mw / 1000,
            "clock_mhz": state.clock_mhz,
            "clock_max_mhz": self._told("nvmlDeviceGetMaxClockInfo", self.handle, self.nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": self._told("nvmlDeviceGetClockInfo", self.handle, memory),
            "memory_clock_max_mhz": self._told("nvmlDeviceGetMaxClockInfo", self.handle, memory),
            "temperature_c": state.temperature_c,
            "processes": self._processes(),
        }

    def notes(self) -> list[str]:
        notes = [MIG] if self.split else []
        if not self.has_counter:
            notes.append(f"this GPU has no energy counter: joules are its power ({self.power_source}), added up")
        if self.power_source == AVERAGE:
            notes.append("nvmlDeviceGetPowerUsage is an average over a second on most GPUs since Ampere: it hides peaks")
        if self._told("nvmlDeviceGetCurrentClocksEventReasons", self.handle) is None:
            notes.append("this driver does not tell what slows the GPU down: hot windows were not left out")
        if (processes := self._processes()) is not None and processes > 1:
            notes.append(f"{processes - 1} other processes had the GPU open: what they drew is in the joules")
        return notes

    def _find(self, uuid: str) -> Any:
        """The board with this UUID; of an instance made by MIG the board it is on."""
        try:
            return self._ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}")
        except NvmlError:
            instance = self._told("nvmlDeviceGetHandleByUUID", f"MIG-{uuid.removeprefix('MIG-')}")
            if instance is None:
                raise
        return self._ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", instance)

    def _reads(self, power_source: str) -> bool:
        try:
            return self._power_mw(power_source) > 0
        except NvmlError:
            return False

    def _power_mw(self, source: str | None) -> float:
        if source == AVERAGE:
            return float(self._ask(AVERAGE, self.handle))
        value = self._ask("nvmlDeviceGetFieldValues", self.handle, [self.nvml.NVML_FI_DEV_POWER_INSTANT])[0]
        if value.nvmlReturn:  # each value has a return code of its own
            raise NvmlError(INSTANT, value.nvmlReturn, "no value")
        return float(value.value.uiVal)

    def _finds_counter(self) -> bool:
        try:
            self._ask(COUNTER, self.handle)
        except NvmlError as error:
            if error.code not in (NOT_SUPPORTED, FUNCTION_NOT_FOUND):
                raise
            if self.power_source is None:
                raise MeterError(
                    "this GPU has neither an energy counter (Volta and newer have one) nor a power reading"
                ) from error
            return False
        return True

    def _add_up(self) -> float:
        """Each power reading holds until the next."""
        now, power_w = self.clock(), self.power_w()
        self.added_mj += 1000 * self.held_w * (now - self.held_since)
        self.held_w, self.held_since = power_w, now
        return self.added_mj

    def _processes(self) -> int | None:
        processes = self._told("nvmlDeviceGetComputeRunningProcesses", self.handle)
        return None if processes is None else len(processes)

    def _told(self, function: str, *arguments: Any) -> Any:
        """As `_ask`; None where NVML cannot tell."""
        try:
            return self._ask(function, *arguments)
        except NvmlError:
            return None

    def _ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self.nvml, function)(*arguments)
        except self.nvml.NVMLError as error:
            raise NvmlError(function, error.value, error) from error
