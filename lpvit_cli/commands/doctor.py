"""doctor: what this machine can do, each line ok or with the way to get there."""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import dataclass

from lpvit_kernels.home import cache_folder

from lpvit_cli.errors import LpvitError
from lpvit_cli.machine import cpu_features, cpu_name, installed, temporary_home
from lpvit_cli.measure.energy.meters import open_meter

OPTIONAL = {
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export, predict on .onnx files",
    "openvino": "export --format openvino",
    "matplotlib": "pictures in report.html",
    "scikit-learn": "the built-in digits",
    "transformers": "models named transformers:...",
    "datasets": "hfds/ datasets",
    "webdataset": "wds/ datasets",
}


SHARED_MEMORY, ENOUGH_SHARED_MEMORY = "/dev/shm", 2**30


@dataclass(frozen=True)
class Finding:
    what: str
    ok: bool
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    import torch

    findings = [
        Finding("lpvit", True, f"{installed('lpvit')}, Python {platform.python_version()}"),
        Finding("torch", True, f"{torch.__version__}, timm {installed('timm')}"),
        Finding("CPU", True, f"{cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
    ]
    findings += _targets(torch.get_num_threads())
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        findings.append(
            Finding(f"cuda:{index}", True, f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}")
        )
    if count == 0:
        built = torch.version.cuda
        remedy = "an NVIDIA driver is needed" if built else "install a CUDA build of torch"
        findings.append(Finding("GPU", False, "no usable CUDA device; everything runs on the CPU", remedy))
    triton = installed("triton")
    findings.append(Finding("triton", bool(triton), triton or "not installed", "" if triton else "pip install triton (Linux)"))
    for kind in ("cuda", "cpu"):
        uuid = str(torch.cuda.get_device_properties(0).uuid) if kind == "cuda" and count else ""
        meter, reasons = open_meter(kind, uuid)
        name = "GPU energy (NVML)" if kind == "cuda" else "CPU energy (RAPL)"
        detail = f"readable ({meter.source})" if meter else "; ".join(reasons)
        findings.append(Finding(name, meter is not None, detail, "energy is reported as not measured"))
    findings += _profiles()
    findings += [_cache(), *_shared_memory()]
    for package, use in OPTIONAL.items():
        found = installed(package)
        findings.append(Finding(package, bool(found), found or f"not installed; needed for {use}", f"pip install {package}"))
    return findings


def _targets(threads: int) -> list[Finding]:
    """What a recipe may name as its target on this CPU, and what of the processor makes it fast or is missing."""
    features = cpu_features()
    has, lacks = ([name for name, there in features.items() if there is kind] for kind in (True, False))
    told = f"{', '.join(has) or 'none'}{'; lacks ' if lacks else ''}{', '.join(lacks)}" if features else "not known"
    bf16 = "float32, bfloat16" if features.get("bf16", True) else "float32; bfloat16 is slow without bf16"
    findings = [
        Finding("CPU features", not lacks, told),
        Finding("target torch", True, f"{bf16}; {threads} threads"),
    ]
    cores, wrong = os.cpu_count() or 1, "int8 is slow and may saturate here: compare its accuracy, or take float32"
    for runtime, precisions, how in (
        ("onnxruntime", "float32, int8, int8-static", "target.runtime"),
        ("openvino", "float32", "export.formats alone"),
    ):
        there = installed(runtime) is not None
        slow = there and "int8" in precisions and features.get("VNNI") is False
        detail = f"{precisions} ({how}); {cores} threads{'; lacks VNNI' if slow else ''}"
        remedy = wrong if slow else f"pip install {runtime}"
        findings.append(Finding(f"target {runtime}", there and not slow, detail if there else "not installed", remedy))
    return findings


def _cache() -> Finding:
    """Where tuning, profiles and listings of tar files are kept."""
    folder = cache_folder()
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if temporary_home() and above.is_relative_to(tempfile.gettempdir()):
        return Finding(
            "cache", False, f"{folder}: temporary, for want of a home folder", "set HOME or LPVIT_CACHE to one that stays"
        )
    writable = above.is_dir() and os.access(above, os.W_OK)
    return Finding(
        "cache", writable, f"{folder}{'' if writable else ': cannot be written'}", "set LPVIT_CACHE to a folder of yours"
    )


def _shared_memory(mount: str = SHARED_MEMORY) -> list[Finding]:
    """Through which processes that decode images give them to lpvit; containers have little of it."""
    if not os.path.isdir(mount):
        return []
    facts = os.statvfs(mount)
    free = facts.f_bavail * facts.f_frsize
    enough = free >= ENOUGH_SHARED_MEMORY
    remedy = f"docker run --shm-size={ENOUGH_SHARED_MEMORY >> 30}g, or --set data.workers=0"
    return [Finding(mount, enough, f"{free / 2**20:,.0f} MiB free{'' if enough else ', little for data.workers'}", remedy)]


def _profiles() -> list[Finding]:
    """The saved device profiles."""
    from lpvit_cli.measure.profile import DeviceProfile, saved_profiles

    findings = []
    for path in saved_profiles():
        name = f"profile {path.stem}"
        try:
            saved = DeviceProfile.load(path)
        except LpvitError as error:
            findings.append(Finding(name, False, error.message, error.hint))
        else:
            energy = f"energy by {saved.energy_source}" if saved.energy_source else "no energy"
            where = f"{saved.model} on {saved.device}, {saved.dtype}, batch {saved.batch_size}"
            findings.append(Finding(name, True, f"{where}; {energy}"))
    return findings or [Finding("device profiles", False, "none saved", "lpvit profile RECIPE --name NAME")]
