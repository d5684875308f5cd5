"""The tile shapes the kernels may run with, and which of them fit a block, a number of tokens and a GPU.

Nothing here has been measured on a GPU. The shapes come from kernels compiled ahead of time (`make aot`), which shows registers,
spills, shared memory and pipeline buffers, but no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["forward", "input_gradient", "weight_gradient"]

BYTES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}


@dataclass(frozen=True)
class Config:
    """How a kernel is tiled.

    tile         tokens of one program (weight_gradient: neighbouring blocks of one program)
    step         features of one step of the loop (weight_gradient: tokens)
    warps        of one program
    stages       of the software pipeline
    descriptors  tensor descriptors (TMA) instead of pointers; compute capability 9.0 and newer
    splits       weight_gradient: parts of the tokens computed apart, then summed
    """

    tile: int
    step: int
    warps: int
    stages: int
    descriptors: bool = False
    splits: int = 1
