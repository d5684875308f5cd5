"""Power meters, one file each."""

from __future__ import annotations

from lpvit_cli.measure.energy.meters.base import Meter, MeterError
from lpvit_cli.registry import METERS


def open_meter(device_type: str, uuid: str = "", allow_mig: bool = False) -> tuple[Meter | None, list[str]]:
    """A meter of a device ("cuda" or "cpu"), or None and the reasons. Meters that were added are asked first."""
    reasons = []
    for kind in (METERS.get(name) for name in reversed(METERS.names())):
        if device_type in kind.devices:
            try:
                return kind.open(uuid, allow_mig), []
            except MeterError as error:
                reasons.append(str(error))
    return None, reasons
