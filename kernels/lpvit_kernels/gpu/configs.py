"""The tile shapes that the kernels may run with, and which of them fit a block, a number of tokens and a GPU.

Nothing here has been measured on a GPU. The shapes come from kernels compiled ahead of time (`make aot`), which shows registers,
spills, shared memory and pipeline buffers, but no time: a caller who wants the fastest times `candidates` on its own GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch

Kind = Literal["forward", "input_gradient", "weight_gradient"]

SIDES = (16, 32, 64, 128)  # of a block, along out and along in
BYTES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}
SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}  # KiB per multiprocessor that programs can use
OTHER_SHARED = 99  # consumer GPUs
WARPS = (4, 8, 16)
STAGES = (4, 3, 2)
MOST = 20  # configurations worth timing
FULL = 2  # programs per multiprocessor below which tokens are split


@dataclass(frozen=True)
class Config:
    """How a kernel is tiled.

    tile         tokens of one program (weight_gradient: neighbouring blocks of one program)
    step         features of one step of its loop (weight_gradient: tokens)
    warps        of one program
    stages       of the software pipeline
    descriptors  tensor descriptors (TMA) instead of pointers: compute capability 9.0 and newer
    splits       weight_gradient: parts of the tokens that are computed apart, then summed
    """

    tile: int
    step: int
    warps: int
    stages: int
    descriptors: bool = False
    splits: int = 1


def supports(dtype: torch.dtype, block: tuple[int, int], capability: tuple[int, int]) -> bool:
    """Whether the kernels take values of this type and blocks of this size on a GPU of this compute capability."""
    return dtype in BYTES and block[0] in SIDES and block[1] in SIDES and capability >= (8, 0)


def default(kind: Kind, dtype: torch.dtype, block: tuple[int, int], tokens: int, capability: tuple[int, int]) -> Config:
    """The configuration to use where none was timed: the first candidate."""
    return candidates(kind, dtype, block, tokens, capability)[0]


def candidates(
    kind: Kind, dtype: torch.dtype, block: tuple[int, int], tokens: int, capability: tuple[int, int]
) -> list[Config]:
    """At most 20 configurations worth timing, the likeliest first, that fit registers and shared memory."""
    every = _weight_gradients(dtype, block) if kind == "weight_gradient" else _products(kind, dtype, block, tokens, capability)
    return [config for config in every if fits(config, kind, dtype, block, capability)][:MOST]


def splits(programs: int, tokens: int, config: Config, processors: int) -> int:
    """Parts of the tokens that fill a GPU of so many multiprocessors with so few programs; each part keeps four steps."""
    wanted = -(-FULL * processors // programs)
    return max(1, min(wanted, tokens // (4 * config.step)))


def fits(config: Config, kind: Kind, dtype: torch.dtype, block: tuple[int, int], capability: tuple[int, int]) -> bool:
    """Whether a thread's sums leave registers for the rest, and two programs' pipelines share a multiprocessor's memory."""
    rows, columns = sides(config, kind, block)
    sums = rows * columns / (32 * config.warps)
    buffers = config.stages if capability >= (9, 0) else config.stages - 1  # mma.sync reads its operands from registers
    pipeline = buffers * (rows + columns) * config.step * BYTES[dtype]
    enough = sums >= 16 or config.warps == 4  # more warps than that would only wait
    return enough and sums <= (32 if dtype == torch.float32 else 64) and pipeline <= shared(capability) // 2


def sides(config: Config, kind: Kind, block: tuple[int, int]) -> tuple[int, int]:
    """The tile of results of one program."""
    if kind == "weight_gradient":
        return block[0], config.tile * block[1]
    return config.tile, block[0] if kind == "forward" else block[1]


def shared(capability: tuple[int, int]) -> int:
    """Bytes of shared memory per multiprocessor."""
    return 1024 * SHARED.get(capability, OTHER_SHARED)


def _products(
    kind: Kind, dtype: torch.dtype, block: tuple[int, int], tokens: int, capability: tuple[int, int]
) -> list[Config]:
    """For the forward product and dX, likeliest first."""
    side = block[1] if kind == "forward" else block[0]
    usual = 64 if BYTES[dtype] == 2 else 32
    steps = [usual] + [side] * (side in (usual // 2, 2 * usual))
    tiles = [128, 64] if tokens > 1024 else [64, 32, 128] if tokens > 64 else [32, 16, 64] if tokens > 16 else [16]
    described = [True, False] if capability >= (9, 0) and tokens > 1024 else [False, True] if capability >= (9, 0) else [False]
    every = product(steps, tiles, WARPS, STAGES, described)
    return [
        Config(tile, step, warps, stages, descriptors)
        for step, tile, warps, stages, descriptors in every
        if not (descriptors and step > side)
    ]


def _weight_gradients(dtype: torch.dtype, block: tuple[int, int]) -> list[Config]:
    """For the gradient of the values, likeliest first."""
    usual = 64 if BYTES[dtype] == 2 else 32
    widths = [max(1, 64 // block[1])] + ([128 // block[1]] if block[1] < 128 else [])
    every = product((1, 4), widths, WARPS, (usual, 2 * usual), STAGES)
    return [Config(per, step, warps, stages, splits=parts) for parts, per, warps, step, stages in every]
