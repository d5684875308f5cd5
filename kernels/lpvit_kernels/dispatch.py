"""Which backend computes a layer: what tuning found fastest on this device, else a rule of thumb."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lpvit_kernels import tuned
from lpvit_kernels.matrix import BlockSparseMatrix
from lpvit_kernels.tuned import Choice

Kind = Literal["forward", "input_gradient", "weight_gradient"]
KINDS: tuple[Kind, ...] = ("forward", "input_gradient", "weight_gradient")
FEW_TOKENS = 32
LEAST_CAPABILITY = (8, 0)  # of GPUs


@dataclass(frozen=True)
class Case:
    """All that a choice depends on."""

    kind: Kind
    device: str  # "cpu" or "cuda:0"
    threads: int  # of the CPU
    dtype: str  # "tf32" for float32 on a GPU where torch's own products take it
    shape: tuple[int, int]
    block: tuple[int, int]
    density: float  # to the next twentieth
    tokens: int  # to the next power of two
    rows_agree: bool  # without its empty rows and columns the weight is dense

    @property
    def key(self) -> str:
        """Its name in the file of tuned choices: machine and versions included."""
        sizes = f"{self.shape[0]}x{self.shape[1]} {self.block[0]}x{self.block[1]} {self.density:.2f} {self.tokens}"
        sizes += " rows agree" * self.rows_agree
        return f"{hardware(self.device, self.threads)} | {self.kind} {self.dtype} {sizes}"


def case(kind: Kind, x: Tensor, weight: BlockSparseMatrix) -> Case:
    """`x` [tokens, ...]: the input, or the gradient of the output."""
    density, tokens = -(-weight.density * 20 // 1) / 20, 1 << max(len(x) - 1, 0).bit_length()
    threads = torch.get_num_threads() if x.device.type == "cpu" else 0
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype == "float32" and x.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        dtype = "tf32"
    return Case(kind, str(x.device), threads, dtype, weight.shape, weight.block, density, tokens, weight.rows_agree)


def choose(kind: Kind, backend: str | Choice, x: Tensor, weight: BlockSparseMatrix) -> Choice:
    """The choice for `backend`, which may be "auto" or "cpu", or chosen already."""
    if isinstance(backend, Choice):
        return backend
    if kind == "weight_gradient" and backend == "dense":
        backend = "auto"
    if backend not in ("auto", "cpu"):
        return Choice(backend)
    return _choice(case(kind, x, weight), backend, tuned.changes())


def runs_triton(backend: str | Choice, x: Tensor) -> bool:
    """Whether what surrounds the products, which no tuning decides, is left to triton."""
    name = backend.backend if isinstance(backend, Choice) else backend
    return name == "triton" or (name == "auto" and x.is_cuda and x.dtype != torch.float64 and not triton_missing(str(x.device)))


@lru_cache(maxsize=4096)
def _choice(case: Case, backend: str, _: int) -> Choice:
    if backend == "auto" and (found := tuned.find(case.key)) and serves(found.choice.backend, case):
        return found.choice
    return by_rule(case, sparse_only=backend == "cpu")


def serves(backend: str, case: Case) -> bool:
    """Whether this backend computes such a product as well as others do, on its device."""
    if backend == "triton":
        return triton_runs(case.device, case.dtype, case.block)
    if case.kind == "weight_gradient":
        return backend == "gathered" or (backend != "dense" and case.device.startswith("cpu"))
    if backend == "strided" and case.dtype in ("float16", "bfloat16"):  # it rounds after every block
        return False
    return backend == "dense" or case.device.startswith("cpu")


def by_rule(case: Case, sparse_only: bool = False) -> Choice:
    """Where nothing was tuned. On GPUs none of this was measured."""
    if case.rows_agree and case.kind != "weight_gradient" and not sparse_only:
        return Choice("dense")
    if not case.device.startswith("cpu"):
        if triton_runs(case.device, case.dtype, case.block):
            return Choice("triton")
        return Choice("gathered" if case.kind == "weight_gradient" else "dense")
    if case.kind == "weight_gradient":
        return Choice("batched" if case.tokens <= FEW_TOKENS else "gathered")
    if not sparse_only and case.density > (0.7 if case.block[0] * case.block[1] >= 2048 else 0.5):
        return Choice("dense")
    return Choice("batched" if case.tokens <= FEW_TOKENS else "gathered")


def triton_runs(device: str, dtype: str, block: tuple[int, int]) -> bool:
    """Whether there is a kernel for this type and block on this device."""
    if triton_missing(device):
        return False
    from lpvit_kernels.gpu import supports

    number = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    return supports(number, block, torch.cuda.get_device_capability(device) if device.startswith("cuda") else LEAST_CAPABILITY)


@cache
def triton_missing(device: str) -> str | None:
    """Why triton kernels cannot run on this device; None: they can."""
    if not find_spec("triton"):
        return "triton is not installed"
    if device.startswith("cuda") and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if not device.startswith("cuda") and not _interpreted():
        return f"it needs a GPU, x is on {device}"
    return None


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def hardware(device: str, threads: int) -> str:
    """The device and the versions that times depend on."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {_triton_version()}"
    return f"{_cpu_name()}, {threads} threads, torch {torch.__version__}"


def _triton_version() -> str:
    if not find_spec("triton"):
        return "no triton"
    import triton

    return f"triton {triton.__version__}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
