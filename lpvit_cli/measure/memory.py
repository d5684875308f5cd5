"""How much memory a call holds at most: by torch's allocator on a GPU, by the resident set of this process on a CPU."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

PROCESS = Path("/proc/self")
RESET_PEAK = "5"  # what clear_refs takes to let VmHWM start anew (proc(5))


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that `call` held at a time beyond those held before it; None: this system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    try:
        release_memory()  # what was freed but kept would hide what the call needs
        (PROCESS / "clear_refs").write_text(RESET_PEAK)
        resident = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - resident)
    except (OSError, AttributeError, TypeError):  # no /proc, not allowed, or another C library
        return None


def release_memory() -> None:
    """Give memory that was freed back to the system: threads that hand tensors to each other leave holes, which add up."""
    with suppress(AttributeError):  # another C library than glibc has no such function
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", (PROCESS / "status").read_text(), re.MULTILINE)
    return 1024 * int(found[1])  # type: ignore[index]
