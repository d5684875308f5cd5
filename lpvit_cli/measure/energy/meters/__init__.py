"""Power meters, one file each."""

from __future__ import annotations

from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.measure.energy.meters.base import Meter, MeterError
from lpvit_cli.registry import METERS


def open_meter(device_type: str, uuid: str = "", allow_mig: bool = False) -> tuple[Meter | None, list[str]]:
    """A meter of a device ("cuda" or "cpu"), or None and the reasons. Meters that were added are asked first."""
    reasons = []
    for name in reversed(METERS.names()):
        try:
            kind = METERS.get(name)
            if device_type in kind.devices:
                return kind.open(uuid, allow_mig), []
        except MeterError as error:
            reasons.append(str(error))
        except EnvironmentFault as error:  # another package's, which does not load
            reasons.append(error.message)
    return None, reasons
