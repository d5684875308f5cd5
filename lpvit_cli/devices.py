"""Devices and compute types, by the names that recipes use."""

from __future__ import annotations

import torch

from lpvit_cli import distributed
from lpvit_cli.errors import EnvironmentFault, UsageError


def pick_device(name: str) -> torch.device:
    """The device of that name; with several processes on a machine, `auto` and `cuda` are the GPU of this one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and distributed.world() > 1:
        if name != "cuda":
            raise UsageError(f"device {name!r}: under torchrun each process has a GPU of its own", "use --device cuda")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is not a torch device", "use auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported", "use auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise EnvironmentFault(f"device {name!r}: this machine has {count} usable CUDA devices", "see: lpvit doctor")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type; weights stay in float32 and are cast on the way (autocast)."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def fast_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type of passes that only gather sums: with `auto`, bfloat16 where the device has instructions for it."""
    if name != "auto":
        return pick_dtype(name, device)
    has = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has else torch.float32


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from lpvit_cli.machine import cpu_name

    return f"{cpu_name()}, {torch.get_num_threads()} threads"
