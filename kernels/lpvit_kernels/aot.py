"""Compile the GPU kernels ahead of time, without a GPU, and check what became of them.

    python -m lpvit_kernels.aot            every block, type and number of tokens with its default configuration
    python -m lpvit_kernels.aot --all      every candidate configuration

This shows what a compiler can tell: the matrix instruction, registers, spills, shared memory, the width of asynchronous
copies and the buffers of the software pipeline. It shows no time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lpvit_kernels.gpu import configs
from lpvit_kernels.gpu.configs import Config, Kind, Precision
from lpvit_kernels.gpu.matmul import matmul
from lpvit_kernels.gpu.weight_gradient import weight_gradient

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
TYPES: tuple[tuple[torch.dtype, Precision], ...] = ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))
CAPABILITIES = ((8, 0), (9, 0))
TOKENS = (16, 197, 50432)  # one of each bucket of configs: few, one image of ViT-B, 256 of them
ALIGNED = ("x_stride", "dy_stride", "features", "out")  # multiples of 16 in every vision transformer


@dataclass(frozen=True)
class Case:
    kind: Kind
    dtype: torch.dtype
    precision: Precision  # of float32 products
    block: tuple[int, int]
    capability: tuple[int, int]
    config: Config


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a Case."""

    mma: str  # "wgmma", "mma.sync" or "fma"
    copy: str  # "tma", "cp.async N" (N bytes, the narrowest) or "load"
    registers: int
    spilled: int  # bytes of stack and local memory of a thread
    shared: int  # bytes of a program
    buffers: int  # tiles of the left operand that the pipeline holds


BLOCKS = tuple(product(configs.SIDES, configs.SIDES))


def cases(every: bool, blocks: Iterable[tuple[int, int]] = BLOCKS) -> list[Case]:
    """Default configurations, or every candidate."""
    found: dict[Case, None] = {}  # a set that keeps its order
    for capability, kind, (dtype, precision), block, tokens in product(CAPABILITIES, get_args(Kind), TYPES, blocks, TOKENS):
        for config in configs.candidates(kind, dtype, block, tokens, capability, precision)[: None if every else 1]:
            found[Case(kind, dtype, precision, block, capability, config)] = None
    return list(found)


def compile_case(case: Case) -> Compiled:
    kernel, types, constants = _arguments(case)
    options = {"num_warps": case.config.warps, "num_stages": case.config.stages, "maxnreg": case.config.registers}
    return _read(compile_kernel(kernel, types, constants, case.capability, options), case)


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, object],
    capability: tuple[int, int],
    options: dict[str, int | None] | None = None,
) -> Any:
    """Triton's compiled kernel. Arguments without a type or a value are None."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    aligned = [i for i, name in enumerate(kernel.arg_names) if types.get(name, "").startswith("*") or name in ALIGNED]
    source = ASTSource(kernel, signature, constexprs, {(i,): [["tt.divisibility", 16]] for i in aligned})
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(source, target=target, options=options)


def problems(case: Case, compiled: Compiled) -> list[str]:
    """What differs from what the configuration was made for; empty if nothing does."""
    config, hopper = case.config, case.capability >= (9, 0)
    wide = configs.sides(config, case.kind, case.block)[0] >= 64  # wgmma multiplies 64 rows at a time
    mma = "fma" if _type(case) == "ieee" else "wgmma" if hopper and wide else "mma.sync"
    # wgmma reads tf32 operands along the summed side only: where it is not the contiguous one, values are copied one by one.
    narrow = mma == "wgmma" and _type(case) == "tf32" and case.kind != "forward"
    copy = "tma" if config.descriptors else "cp.async 4" if narrow else "cp.async 16"
    expected = {
        "mma": mma,
        "copy": copy,
        "spilled": 0,
        "buffers": config.stages if mma == "wgmma" else config.stages - 1,
    }
    wrong = [
        f"{name} {getattr(compiled, name)}, not {value}" for name, value in expected.items() if getattr(compiled, name) != value
    ]
    if compiled.shared > configs.shared(case.capability):
        wrong.append(f"{compiled.shared} bytes of shared memory")
    return wrong


def _type(case: Case) -> str:
    return case.precision if case.dtype == torch.float32 else NAMES[case.dtype]


def _arguments(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    """The kernel, its arguments' types, and its constants; an epilogue of everything."""
    name, config, (height, width) = NAMES[case.dtype], case.config, case.block
    if case.kind == "weight_gradient":
        types = dict.fromkeys(("tokens", "out", "features", "nnz", "dy_stride", "x_stride", "steps"), "i32")
        types |= dict.fromkeys(("row_ptr", "cols"), "*i32") | dict.fromkeys(("dy", "x"), f"*{name}")
        types |= {"dvalues": f"*{name}" if config.splits == 1 else "*fp32"}
        constants: dict[str, object] = {"R": height, "C": width, "PER": config.tile, "STEP": config.step}
        return weight_gradient, types, constants | {"PRECISION": case.precision}
    forward = case.kind == "forward"
    block_k, block_n = (width, height) if forward else (height, width)
    types = dict.fromkeys(("tokens", "features", "out", "x_stride"), "i32")
    types |= dict.fromkeys(("ptr", "across", "place", "order"), "*i32")
    types |= dict.fromkeys(("x", "values", "y", *(("bias", "scale", "residual") if forward else ())), f"*{name}")
    if config.descriptors:
        box = [block_n, config.step] if forward else [config.step, block_n]
        types |= {"x": f"tensordesc<{name}{[config.tile, config.step]}>", "values": f"tensordesc<{name}{box}>"}
    constants = {
        "BLOCK_K": block_k,
        "BLOCK_N": block_n,
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
    widths = [int(width, 0) for width in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (0x[0-9a-f]+|\d+)", ptx)]
    rows = configs.sides(case.config, case.kind, case.block)[0]
    buffers = re.findall(rf"local_alloc : \(\) -> !ttg.memdesc<(?:(\d+)x)?{rows}x{case.config.step}x", ttgir)
    usage = _cuobjdump(kernel.asm["cubin"])
    return Compiled(
        mma="wgmma" if "wgmma.mma_async" in ptx else "mma.sync" if "mma.sync" in ptx else "fma",
        copy="tma" if "cp.async.bulk.tensor" in ptx else f"cp.async {min(widths)}" if widths else "load",
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
        buffers=max((int(count or 1) for count in buffers), default=0),
    )


def _cuobjdump(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every candidate configuration, not the default ones only")
    args = parser.parse_args()
    failed = 0
    print(f"Triton {triton.__version__}; forward products with bias, GELU, scale and residual; no GPU, no time")
    columns = (
        "kernel           type  block    sm  tile step warps stages  desc splits limit | instruction copies      regs spills"
    )
    print(f"{columns}  shared buffers per SM")
    for case in cases(args.all):
        compiled = compile_case(case)
        wrong = problems(case, compiled)
        failed += bool(wrong)
        major, minor = case.capability
        config = "{:4} {:4} {:5} {:6} {!s:>5} {:6} {!s:>5}".format(*astuple(case.config))
        result = "{:11} {:11} {:4} {:6} {:7} {:7}".format(*astuple(compiled))
        print(
            f"{case.kind:16} {_type(case):5} {'x'.join(map(str, case.block)):8} {major}{minor:<2} {config} | "
            f"{result} {_resident(case, compiled):6} {'; '.join(wrong)}".rstrip(),
            flush=True,
        )
    print(f"{failed} configurations are not what they were made to be")
    sys.exit(bool(failed))


def _resident(case: Case, compiled: Compiled) -> int:
    """Programs that registers and shared memory let a multiprocessor hold."""
    threads = 32 * case.config.warps
    registers = 65536 // (threads * -(-compiled.registers // 8) * 8)  # allocated in units of 8 a thread
    return min(registers, configs.shared(case.capability) // (compiled.shared + 1024), 2048 // threads)


if __name__ == "__main__":
    main()
