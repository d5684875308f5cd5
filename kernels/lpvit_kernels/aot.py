"""Compile the GPU kernels ahead of time, without a GPU, and read what became of them.

    python -m lpvit_kernels.aot

This shows what a compiler can tell: the matrix instruction, registers, spills, shared memory, the width of asynchronous copies and
the buffers of the software pipeline. It shows no time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lpvit_kernels.gpu.configs import Config, Kind
from lpvit_kernels.gpu.matmul import matmul
from lpvit_kernels.gpu.weight_gradient import weight_gradient

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    kind: Kind
    dtype: torch.dtype
    precision: str  # of float32 products: "tf32" or "ieee"
    block: tuple[int, int]
    capability: tuple[int, int]
    config: Config


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a Case."""

    mma: str  # "wgmma", "mma.sync" or "fma"
    copy: str  # "tma", "cp.async N" (the narrowest, in bytes) or "loads"
    registers: int
    spilled: int  # bytes of local memory and stack per thread
    shared: int  # bytes per program
    buffers: int  # tiles of x that the pipeline holds


def compile_case(case: Case) -> Compiled:
    kernel, types, constants = _arguments(case)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    aligned = [i for i, name in enumerate(kernel.arg_names) if types.get(name, "").startswith("*") or name in ALIGNED]
    source = ASTSource(kernel, signature, constexprs, {(i,): [["tt.divisibility", 16]] for i in aligned})
    major, minor = case.capability
    options = {"num_warps": case.config.warps, "num_stages": case.config.stages}
    return _read(triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options), case)


ALIGNED = ("x_stride", "dy_stride", "features", "out")  # multiples of 16 in every vision transformer


def _arguments(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    """The kernel, its arguments' types and its constants."""
    name, config, (height, width) = NAMES[case.dtype], case.config, case.block
    if case.kind == "weight_gradient":
        pointers = dict.fromkeys(("dy", "x"), f"*{name}") | dict.fromkeys(("row_ptr", "cols"), "*i32")
        numbers = dict.fromkeys(("tokens", "out", "features", "nnz", "dy_stride", "x_stride", "steps"), "i32")
        result = "fp32" if config.splits > 1 else name
        constants = {"R": height, "C": width, "PER": config.tile, "STEP": config.step, "PRECISION": case.precision}
        return weight_gradient, pointers | numbers | {"dvalues": f"*{result}"}, constants
    forward = case.kind == "forward"
    over, across = (width, height) if forward else (height, width)
    types = dict.fromkeys(("tokens", "features", "out", "x_stride"), "i32") | {"y": f"*{name}"}
    types |= dict.fromkeys(("ptr", "across", "place", "order"), "*i32")
    if forward:
        types |= dict.fromkeys(("bias", "scale", "residual"), f"*{name}")
    if config.descriptors:
        box = (across, config.step) if forward else (config.step, across)
        types |= {"x": f"tensordesc<{name}[{config.tile}, {config.step}]>", "values": f"tensordesc<{name}[{box[0]}, {box[1]}]>"}
    else:
        types |= {"x": f"*{name}", "values": f"*{name}"}
    constants = {
        "BLOCK_K": over,
        "BLOCK_N": across,
        "TRANSPOSED": not forward,
        "RAGGED": False,
        "TILE": config.tile,
        "STEP": config.step,
        "DESCRIPTORS": config.descriptors,
        "ACTIVATION": "gelu" if forward else None,
        "PRECISION": case.precision,
    }
    return matmul, types, constants


def _read(kernel: Any, case: Case) -> Compiled:
    ptx, ttgir = kernel.asm["ptx"], kernel.asm["ttgir"]
    widths = [int(w, 0) for w in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (0x[0-9a-f]+|\d+)", ptx)]
    rows, columns = (case.config.step, case.block[0]) if case.kind == "weight_gradient" else (case.config.tile, case.config.step)
    buffers = re.findall(rf"local_alloc : \(\) -> !ttg.memdesc<(?:(\d+)x)?{rows}x{columns}x", ttgir)
    usage = _cuobjdump(kernel.asm["cubin"])
    return Compiled(
        mma="wgmma" if "wgmma.mma_async" in ptx else "mma.sync" if "mma.sync" in ptx else "fma",
        copy="tma" if "cp.async.bulk.tensor" in ptx else f"cp.async {min(widths)}" if widths else "loads",
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
        buffers=max((int(b or 1) for b in buffers), default=0),
    )


def _cuobjdump(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
