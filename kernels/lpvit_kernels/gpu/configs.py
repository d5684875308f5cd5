"""The tile shapes that the kernels may run with, and which of them fit a block, a number of tokens and a GPU.

Nothing here has been measured on a GPU. The shapes come from kernels compiled ahead of time (`make aot`), which shows
registers, spills, shared memory and pipeline buffers, but no time: who wants the fastest times `candidates` on the own GPU.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import torch

from lpvit_kernels.tuned import Config as Config

Kind = Literal["forward", "input_gradient", "weight_gradient"]
Precision = Literal["ieee", "tf32"]

SIDES = (16, 32, 64, 128)  # of a block, along out and along in
BYTES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}
SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}  # KiB per multiprocessor that programs can use
OTHER_SHARED = 99  # consumer GPUs
WARPS = (4, 8)
STAGES = (4, 3, 2)
MOST = 20  # configurations worth timing
FULL = 2  # programs per multiprocessor below which tokens are split


def supports(dtype: torch.dtype, block: tuple[int, int], capability: tuple[int, int]) -> bool:
    """Whether the kernels take values of this type and blocks of this size on a GPU of this compute capability."""
    return dtype in BYTES and block[0] in SIDES and block[1] in SIDES and capability >= (8, 0)


def default(
    kind: Kind,
    dtype: torch.dtype,
    block: tuple[int, int],
    tokens: int,
    capability: tuple[int, int],
    precision: Precision = "ieee",
) -> Config:
    """The configuration to use where none was timed: the first candidate."""
    return candidates(kind, dtype, block, tokens, capability, precision)[0]


def candidates(
    kind: Kind,
    dtype: torch.dtype,
    block: tuple[int, int],
    tokens: int,
    capability: tuple[int, int],
    precision: Precision = "ieee",
) -> list[Config]:
    """At most 20 configurations worth timing, the likeliest first, that fit registers and shared memory.

    `precision` is that of float32 products; 16-bit types ignore it.
    """
    scalar = dtype == torch.float32 and precision == "ieee"  # no matrix instruction: sums and operands all sit in registers
    every = _weight_gradients(dtype, block) if kind == "weight_gradient" else _products(kind, dtype, block, tokens, capability)
    return [
        config
        for config in every
        if _fits_registers(config, kind, dtype, block, scalar)
        and _fits_memory(config, kind, dtype, block, capability)
        and not (config.descriptors and scalar)
    ][:MOST]


def precision(dtype: torch.dtype) -> Precision:
    """Of products: for float32 what torch.backends.cuda.matmul says, as for torch's own products."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def splits(programs: int, tokens: int, config: Config, processors: int) -> int:
    """Parts of the tokens that fill a GPU of so many multiprocessors with so few programs; each part keeps four steps."""
    wanted = -(-FULL * processors // programs)
    return max(1, min(wanted, tokens // (4 * config.step)))


def _fits_registers(config: Config, kind: Kind, dtype: torch.dtype, block: tuple[int, int], scalar: bool) -> bool:
    """Whether a thread's sums leave room for its operands (found by compiling: see aot.py), and are enough to keep it busy."""
    rows, columns = sides(config, kind, block)
    sums = rows * columns / (32 * config.warps)
    gradient = kind == "weight_gradient"
    if scalar:
        room = config.step <= 32 and (sums * config.step <= 1024 if gradient else sums <= 16)
    else:
        room = sums <= (64 if gradient or BYTES[dtype] == 2 else 32)
    return room and (sums >= 16 or config.warps == min(WARPS))


def _fits_memory(config: Config, kind: Kind, dtype: torch.dtype, block: tuple[int, int], capability: tuple[int, int]) -> bool:
    """Whether two programs' pipelines share a multiprocessor's memory, and every thread has 16 bytes of each tile to copy."""
    rows, columns = sides(config, kind, block)
    column = config.step * BYTES[dtype]
    buffers = config.stages if capability >= (9, 0) else config.stages - 1  # mma.sync reads its operands from registers
    wide = min(rows, columns) * column >= 16 * 32 * config.warps
    return wide and buffers * (rows + columns) * column <= shared(capability) // 2


def sides(config: Config, kind: Kind, block: tuple[int, int]) -> tuple[int, int]:
    """The tile of results of one program."""
    if kind == "weight_gradient":
        return block[0], config.tile * block[1]
    return config.tile, block[0] if kind == "forward" else block[1]


def shared(capability: tuple[int, int]) -> int:
    """Bytes of shared memory per multiprocessor."""
    return 1024 * SHARED.get(capability, OTHER_SHARED)


def _products(kind: Kind, dtype: torch.dtype, block: tuple[int, int], tokens: int, capability: tuple[int, int]) -> list[Config]:
    """For the forward product and dX, likeliest first."""
    side = block[1] if kind == "forward" else block[0]
    usual = 64 if BYTES[dtype] == 2 else 32
    steps = [usual] + [side] * (side in (usual // 2, 2 * usual))
    tiles = [128, 64, 32] if tokens > 1024 else [64, 32, 128] if tokens > 64 else [32, 16, 64] if tokens > 16 else [16]
    described = [True, False] if capability >= (9, 0) and tokens > 1024 else [False, True] if capability >= (9, 0) else [False]
    # On sm_80 the compiler likes 204 registers for this one; with 168, which it can do with, a third program fits.
    many = tokens > 1024 and capability == (8, 0) and usual == 64
    squeezed = [Config(128, 64, 4, 3, registers=168)] * (many and kind == "forward" and block[0] == 64)
    every = product(steps, tiles, WARPS, STAGES, described)
    return squeezed + [
        Config(tile, step, warps, stages, descriptors)
        for step, tile, warps, stages, descriptors in every
        if not (descriptors and step > side)
    ]


def _weight_gradients(dtype: torch.dtype, block: tuple[int, int]) -> list[Config]:
    """For the gradient of the values, likeliest first."""
    usual = 64 if BYTES[dtype] == 2 else 32
    widths = [max(1, 64 // block[1])] + ([128 // block[1]] if block[1] < 128 else [])
    every = product((1, 4), widths, (usual, usual // 2, 2 * usual), WARPS, STAGES)
    return [Config(per, step, warps, stages, splits=parts) for parts, per, step, warps, stages in every]
