"""The GPU kernels on a GPU: what the interpreter cannot see. Dividing and ragged shapes, and every candidate configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch
from gpu_cases import BLOCKS, TOLERANCE, Case, check_epilogue, check_kept_product, check_products, close, matrix
from lpvit_kernels import linear
from lpvit_kernels.gpu import candidates, weight_gradient
from lpvit_kernels.gpu.configs import Kind, Precision
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees no CUDA device"),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody has written to is NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["fp32", "tf32", "fp16", "bf16"])
def number(request: pytest.FixtureRequest) -> Iterator[tuple[torch.dtype, float]]:
    """A type, and the tolerance of its products."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(request.param, torch.float32)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if request.param == "tf32" else "ieee"
    yield dtype, 1e-3 if request.param == "tf32" else TOLERANCE[dtype]
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block(block: tuple[int, int], number: tuple[torch.dtype, float]) -> None:
    for tokens in (1, 17, 197, 394, 6304):
        check_products(Case((768, 384), block, tokens, 0.3), number[0], "cuda", number[1])
        check_products(Case((500, 300), block, tokens, 0.5, empty=1), number[0], "cuda", number[1])


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("block", [(64, 64), (128, 16)])
def test_none_and_all_kept(block: tuple[int, int], density: float, number: tuple[torch.dtype, float]) -> None:
    check_products(Case((500, 300), block, 394, density), number[0], "cuda", number[1])


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("parts", [(), ("bias",), ("bias", "scale", "residual"), ("scale",), ("residual",)])
def test_epilogues(activation: str | None, parts: tuple[str, ...], number: tuple[torch.dtype, float]) -> None:
    check_epilogue(activation, parts, Case((500, 300), (64, 64), 1000, 0.4, empty=1), number[0], "cuda", number[1])


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("block", [(64, 64), (128, 128), (128, 32), (16, 16)])
def test_every_candidate(block: tuple[int, int], kind: Kind, number: tuple[torch.dtype, float]) -> None:
    capability = torch.cuda.get_device_capability()
    precision: Precision = "tf32" if number[1] > TOLERANCE[number[0]] else "ieee"
    for tokens in (16, 197, 6304):
        for config in candidates(kind, number[0], block, tokens, capability, precision):
            case = replace(Case((768, 384), block, tokens, 0.3), **{kind: config})
            check_products(case, number[0], "cuda", number[1])


@pytest.mark.parametrize("block", [(16, 16), (64, 32), (128, 128)])
def test_the_product_of_two_factors_on_kept_blocks(block: tuple[int, int], number: tuple[torch.dtype, float]) -> None:
    for shape in ((768, 3072), (300, 500)):
        check_kept_product(Case(shape, block, 0, 0.3, empty=1), 16, number[0], "cuda", number[1])


def test_the_gradient_of_the_values_does_not_depend_on_timing() -> None:
    weight = matrix(Case((128, 128), (64, 64), 1, 0.5), torch.bfloat16, "cuda")  # two blocks: tokens in many parts
    x, dy = torch.randn(2, 20000, 128, device="cuda").bfloat16()
    first = weight_gradient(dy, x, weight)
    assert all(torch.equal(weight_gradient(dy, x, weight), first) for _ in range(10))


def test_the_public_operation_compiles_into_one_graph_and_is_captured() -> None:
    """torch.compile forward and backward, and a CUDA graph, against the reference."""
    weight = matrix(Case((500, 300), (64, 64), 1, 0.4, empty=1), torch.float32, "cuda")
    x, bias = torch.randn(197, 300, device="cuda"), torch.randn(500, device="cuda")

    def run(x: Tensor, backend: str) -> Tensor:
        return linear(x, weight, bias, "gelu", backend=backend)

    expected = run(x, "reference").double()
    compiled = torch.compile(run, fullgraph=True)
    given = x.clone().requires_grad_()
    y = compiled(given, "triton")
    close(y, expected, TOLERANCE[torch.float32])
    (found,) = torch.autograd.grad(y.square().sum(), given)
    reference = x.double().requires_grad_()
    w = weight.to("cuda", torch.float64)
    (wanted,) = torch.autograd.grad(linear(reference, w, bias.double(), "gelu", backend="reference").square().sum(), reference)
    close(found, wanted, 1e-5)

    with torch.no_grad():
        run(x, "auto")  # indices are made, and kernels compiled, before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(x, "auto")
        x.copy_(torch.randn_like(x))
        graph.replay()
        close(captured, run(x, "reference").double(), TOLERANCE[torch.float32])
