"""What machine a number was measured on."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def cpu_name() -> str:
    """The processor's model name as the kernel gives it, else the architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def machine() -> dict[str, str | int | None]:
    """Host facts that belong beside every measurement."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}


def provenance(*packages: str) -> dict[str, object]:
    """When, where and with which versions of `packages` a result came about."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {package: installed(package) for package in packages},
    }


def installed(package: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
