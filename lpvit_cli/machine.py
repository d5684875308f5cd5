"""What machine a number was measured on."""

from __future__ import annotations

import getpass
import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
_temporary_home: Path | None = None


CPU_FEATURES = {  # what makes a precision fast, by the kernel's names for it
    "AVX-512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni", "amx_int8"},  # int8 products that are summed in 32 bits at once
    "AMX": {"amx_tile"},
    "bf16": {"avx512_bf16", "amx_bf16"},
}


def cpu_name() -> str:
    """The processor's model name as the kernel gives it, else the architecture."""
    return _cpu_line("model name") or platform.processor() or platform.machine()


def cpu_features() -> dict[str, bool]:
    """Whether the processor has each of CPU_FEATURES; empty where that is not known, and on other processors than x86."""
    flags = set(_cpu_line("flags").split())
    return {name: bool(flags & any_of) for name, any_of in CPU_FEATURES.items()} if flags else {}


def _cpu_line(key: str) -> str:
    """What the kernel says of the first processor; empty where it says nothing of that."""
    try:
        found = re.search(rf"^{key}\s*:\s*(.*)$", CPU_INFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else ""


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
