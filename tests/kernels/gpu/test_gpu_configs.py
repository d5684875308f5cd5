"""The shipped configurations, without a GPU: that there are some for everything, and what a compiler makes of them."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from typing import get_args

import pytest
import torch
from lpvit_kernels import aot
from lpvit_kernels.gpu import Config, candidates, default, supports
from lpvit_kernels.gpu.configs import MOST, SIDES, Kind, splits
from lpvit_kernels.gpu.epilogue import epilogue_gradient
from lpvit_kernels.gpu.linear import EPILOGUE_STEPS, EPILOGUE_TILE

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kind", get_args(Kind))
def test_there_are_candidates_for_everything(kind: Kind, capability: tuple[int, int]) -> None:
    for (dtype, precision), block, tokens in product(aot.TYPES, product(SIDES, SIDES), (1, 17, 197, 800, 50432)):
        found = candidates(kind, dtype, block, tokens, capability, precision)
        assert 1 <= len(set(found)) == len(found) <= MOST
        assert default(kind, dtype, block, tokens, capability, precision) == found[0]
        assert capability >= (9, 0) or not any(config.descriptors for config in found)


def test_what_is_supported() -> None:
    assert supports(torch.bfloat16, (128, 16), (8, 0))
    assert not supports(torch.float64, (64, 64), (9, 0))
    assert not supports(torch.float16, (64, 48), (9, 0))
    assert not supports(torch.float16, (64, 64), (7, 5))


def test_tokens_are_split_only_where_programs_are_few() -> None:
    config = Config(1, 64, 4, 3)
    assert splits(1000, 50432, config, processors=132) == 1
    assert splits(50, 50432, config, processors=132) == 6
    assert splits(1, 197, config, processors=132) == 1  # a part of less than four steps is not worth it
    assert splits(1, 2560, config, processors=132) == 10


# A wide block with every type, a tall and narrow one with bfloat16; `make aot` compiles all.
SOME = [
    case
    for block in ((64, 64), (128, 16))
    for case in aot.cases(every=False, blocks=[block])
    if block == (64, 64) or case.dtype == torch.bfloat16
]


@pytest.mark.parametrize("case", SOME, ids=lambda case: f"{case.kind}-{aot._type(case)}-{case.block}-{case.capability}")
def test_compiled_kernels_are_what_they_were_made_to_be(case: aot.Case) -> None:
    assert aot.problems(case, aot.compile_case(case)) == []


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_the_gradient_of_an_epilogue_compiles(name: str, activation: str | None, capability: tuple[int, int]) -> None:
    types = {"dy": f"*{name}", "preactivation": f"*{name}", "scale": f"*{name}", "dz": f"*{name}"}
    types |= {"dbias": "*fp32", "dscale": "*fp32", "tokens": "i32", "out": "i32"}
    constants = {"ACTIVATION": activation, "TILE": EPILOGUE_TILE[1], "STEP": EPILOGUE_TILE[0], "STEPS": EPILOGUE_STEPS}
    ptx = aot.compile_kernel(epilogue_gradient, types, constants, capability).asm["ptx"]
    assert ".v4.b32" in ptx  # 16 bytes at once


def test_a_kernel_that_spills_is_a_problem() -> None:
    case = aot.Case("forward", torch.bfloat16, "ieee", (128, 64), (8, 0), Config(256, 64, 4, 4))
    assert any("spilled" in problem for problem in aot.problems(case, aot.compile_case(case)))


def test_importing_the_package_leaves_the_gpu_kernels_alone() -> None:
    """torch's own flop counter may import Triton; the package works without."""
    code = "import sys, lpvit_kernels; sys.exit('lpvit_kernels.gpu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
