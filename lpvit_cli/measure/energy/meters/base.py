"""What a power meter is. No meter, no number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


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


class Meter(ABC):
    """A power meter. All but `power_w` is called from one thread. Settings of devices are read, never changed."""

    devices: tuple[str, ...]  # types of devices, "cuda" or "cpu", whose energy it tells
    source: str  # of the joules
    has_counter: bool = True  # else joules are powers, added up
    power_source: str | None = None  # of `power_w`; None: there is no power reading
    fewest_calls: int = 1  # in a window, for a counter slow enough to be read in the middle of one

    @classmethod
    @abstractmethod
    def open(cls, uuid: str, allow_mig: bool) -> Meter:
        """The meter of a device; `uuid` of a GPU, as torch gives it. Raises MeterError where there is none."""

    @abstractmethod
    def read(self) -> Reading:
        """Raises MeterError."""

    def power_w(self) -> float:
        """Raises MeterError."""
        raise MeterError(f"{self.source} has no power reading")

    def state(self) -> State:
        return State()

    def facts(self) -> dict[str, str | float | None]:
        """What the device is and how it is set."""
        return {}

    def notes(self) -> list[str]:
        """What a reader of the numbers should know."""
        return []
