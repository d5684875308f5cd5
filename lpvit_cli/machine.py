"""What machine a number was measured on."""

from __future__ import annotations

import getpass
import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_temporary_home: Path | None = None


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


def settle() -> None:
    """Give this process a home folder and a user name where it has none, as a uid without an account in a container.

    Without one some libraries raise, and others write into a folder named ~. The home is then a folder of this user's alone
    among the temporary ones.
    """
    global _temporary_home
    home = os.path.expanduser("~")
    if not os.path.isabs(home) or not os.access(home, os.W_OK):
        from lpvit_kernels.home import has_home, private_folder  # imports torch, for which nobody else should wait

        _temporary_home = None if has_home() else private_folder()
    if _temporary_home:
        os.environ["HOME"] = str(_temporary_home)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"


def temporary_home() -> Path | None:
    """Where `settle` has put the home folder; None: the user has one."""
    return _temporary_home
