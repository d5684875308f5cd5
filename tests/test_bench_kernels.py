"""What scripts/bench_kernels.py makes of its measurements, and that it never times a wrong result."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bench_kernels import Bench, Panel, least_ms, panels
from helpers import relative
from kernel_crossovers import crossover, crossovers
from kernel_rivals import Problem, bsr_rivals, dense_rivals, layers_of
from lpvit_kernels.random import random_block_sparse
from torch import Tensor

from lpvit_cli.measure.roofline import Ceilings

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([0.5, 0.8, 1.2], 0.4),
        ([0.5, 0.9, 0.8], None),
        ([1.1, 1.2, 1.3], 0.0),
        ([1.2, 0.8, 1.6], 0.35),  # noise at a low sparsity is no crossover
    ],
    ids=str,
)
def test_the_crossover_is_where_the_line_goes_through_one(ratios: list[float], expected: float | None) -> None:
    assert crossover(list(zip((0.0, 0.3, 0.5), ratios, strict=True))) == expected


def test_a_crossover_weighs_layers_by_their_time() -> None:
    """One layer that takes nine tenths of the time, one that is ten times faster."""

    def row(layer: str, sparsity: float, dense: float, sparse: float) -> dict[str, Any]:
        which = {"model": "m", "tokens": 1, "block": "2x2", "mode": "eager", "layer": layer, "sparsity": sparsity}
        return {**which, "fastest_dense": "compiled", "dense_ms": 1e9, "compiled_ms": dense, "sparse_ms": sparse}

    rows = [row("a", 0.0, 9.0, 19.9), row("b", 0.0, 1.0, 0.1), row("a", 0.5, 9.0, 4.9), row("b", 0.5, 1.0, 0.1)]
    (found,) = crossovers(rows)  # 10 / 20, then 10 / 5: a third of the way
    assert math.isclose(found["sparsity"], 0.167)


def test_the_grid_goes_through_every_axis_before_it_goes_deep() -> None:
    found = panels("cuda")
    assert len(set(found)) == len(found) == 72
    assert found[0] == Panel("DeiT-B", 256, (64, 64))
    assert {panel.images for panel in found[:8]} == {256, 64, 1}
    assert {panel.model for panel in found[:8]} == {"DeiT-B", "DeiT-S"}


def test_the_roofline_of_a_layer() -> None:
    """fc2 of a model with 64 features, 10 tokens, half of its 64 blocks of 16x16 kept: FLOPs bind, then bytes."""
    problem = Problem.random(layers_of(64)[3], 10, CPU, torch.float32)
    weight = random_block_sparse((64, 256), (16, 16), 0.5)
    flops, elements = 2 * 10 * 32 * 256, 10 * 256 + 64 + 32 * 256 + 2 * 10 * 64
    assert math.isclose(least_ms(Ceilings(1e6, 1e12), problem, weight), 1e3 * flops / 1e6)
    assert math.isclose(least_ms(Ceilings(1e12, 1e6), problem, weight), 1e3 * 4 * elements / 1e6)


@pytest.mark.parametrize("layer", layers_of(32), ids=lambda layer: layer.name)
def test_rivals_and_ours_compute_the_same_layer(layer: Any) -> None:
    problem = Problem.random(layer, 37, CPU, torch.float32)
    weight = random_block_sparse((layer.out, layer.features), (16, 8), 0.5)
    reference = problem.reference(weight.to_dense())
    rivals = dense_rivals(problem, weight.to_dense())
    del rivals["compiled"]  # compiling needs a C++ compiler, and time
    assert set(rivals) >= {"dense"}
    sparse = Bench.sparse(Bench.__new__(Bench), problem, weight)
    for call in (*rivals.values(), sparse):
        assert relative(call(), reference) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("layer", layers_of(128), ids=lambda layer: layer.name)
def test_the_bsr_rival_computes_the_same_layer(layer: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    problem = Problem.random(layer, 37, torch.device("cuda"), torch.float16)
    weight = random_block_sparse((layer.out, layer.features), (32, 16), 0.5, dtype=torch.float16, device="cuda")
    for call in bsr_rivals(problem, weight, tuned=True).values():
        assert relative(call(), problem.reference(weight.to_dense())) < 1e-3


def test_what_is_wrong_is_not_timed() -> None:
    bench = Bench.__new__(Bench)
    bench.dtype, bench.failures = torch.float32, set()

    def fails() -> Tensor:
        raise RuntimeError("no such kernel\nand a long story")

    right = torch.ones(3)
    calls = {"sparse": lambda: right, "bsr": lambda: 2 * right, "mkldnn": fails, "compiled": lambda: right}
    assert list(bench.right(calls, right.double())) == ["sparse", "compiled"]
    assert bench.failures == {"bsr: wrong result, relative error 1.0e+00", "mkldnn: RuntimeError: no such kernel"}
    for wrong in (2 * right, right * math.nan):
        with pytest.raises(SystemExit, match="sparse: wrong result"):
            bench.right({"sparse": lambda wrong=wrong: wrong}, right.double())
