"""Every linear layer of a vision transformer, block-sparse against dense: PyTorch's, compiled, and PyTorch's own block-sparse.

    python scripts/bench_kernels.py --output benchmarks/results/kernels_gpu.json
    python scripts/bench_kernels.py --device cpu --threads 1 --output benchmarks/results/kernels_cpu.json

The grid is models x tokens x block shapes, breadth before depth, as much of it as fits into --minutes (--full: all). All about
one layer runs interleaved on the same random data; outputs are checked against float64 first. On a GPU everything is timed both
eagerly and as a CUDA graph. `auto` chooses after tuning, and may choose dense: the table says what ran. In the table

    ratio      the fastest dense time over the sparse one: above 1 is faster
    TFLOP/s    of multiplications and additions in kept blocks
    roofline   the least time over the measured one, by FLOPs and by bytes, from what the device reached in a large product and
               a large copy just before. Data that stays in a cache may beat it.

On a CPU `frozen_ms` is the layer as a frozen model runs it, with what was tuned; null where it runs as nn.Linear.
The last line of stdout is the result as JSON; a picture of the crossovers goes beside --output.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from kernel_crossovers import Row, crossovers, draw
from kernel_rivals import Call, Layer, Problem, bsr_rivals, dense_rivals, layers_of, works
from lpvit_kernels import BlockSparseMatrix, backends, linear, tune
from lpvit_kernels.random import random_block_sparse
from lpvit_kernels.tuned import Choice
from results import publish
from torch import Tensor

from lpvit_cli.machine import cpu_name
from lpvit_cli.measure.roofline import Ceilings
from lpvit_cli.measure.timing import Subject, TimingRun, time_interleaved
from lpvit_cli.sparse.frozen import FrozenLinear

# Each axis in the order of interest.
MODELS = {"DeiT-B": 768, "DeiT-S": 384, "ViT-L": 1024}
BLOCKS = ((64, 64), (128, 32), (32, 32), (128, 64), (64, 32), (128, 16), (128, 128), (16, 16))
IMAGES = {"cuda": (256, 64, 1), "cpu": (1, 8)}
TOKENS = 197  # of an image
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8)
BSR_SPARSITIES = (0.5, 0.7, 0.8)
DENSE = ("dense", "compiled", "mkldnn")
OURS = ("dense", "sparse")  # without which there is no benchmark
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Panel:
    """The layers of a block at all sparsities: a line of the picture."""

    model: str
    images: int
    block: tuple[int, int]


def least_ms(ceilings: Ceilings, problem: Problem, weight: BlockSparseMatrix) -> float:
    """The roofline: of the kept blocks, and of reading and writing everything once."""
    tensors = (problem.x, problem.bias, weight.values) + ((problem.residual,) if problem.residual is not None else ())
    written = len(problem.x) * problem.layer.out * problem.x.element_size()
    return ceilings.least_ms(flops(problem, weight), written + sum(tensor.nbytes for tensor in tensors))


def flops(problem: Problem, weight: BlockSparseMatrix) -> int:
    return 2 * len(problem.x) * weight.values.numel()


def panels(device: str) -> list[Panel]:
    """All of them, those first whose model, tokens and block come early: breadth before depth."""
    axes: list[list[Any]] = [list(MODELS), list(IMAGES[device]), list(BLOCKS)]
    every = list(product(*axes))
    every.sort(key=lambda panel: sum(axis.index(value) for axis, value in zip(axes, panel, strict=True)))
    return [Panel(*panel) for panel in every]


class Bench:
    """A device, a type, and what it can do at most."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rounds: int):
        self.device, self.dtype, self.rounds = device, dtype, rounds
        self.gpu = device.type == "cuda"
        self.ceilings = Ceilings.measure(device, dtype)
        self.failures: set[str] = set()  # of rivals

    def panel(self, panel: Panel) -> list[Row]:
        rows = []
        for layer in layers_of(MODELS[panel.model]):
            about = {"model": panel.model, "layer": layer.name, "out": layer.out, "in": layer.features}
            about |= {"tokens": panel.images * TOKENS, "block": "x".join(map(str, panel.block))}
            rows += [about | found for found in self.layer(layer, panel.images * TOKENS, panel.block)]
        return rows

    def layer(self, layer: Layer, tokens: int, block: tuple[int, int]) -> list[Row]:
        """One interleaved run: dense, and sparse at each sparsity."""
        problem = Problem.random(layer, tokens, self.device, self.dtype)
        full = torch.randn(layer.out, layer.features, device=self.device, dtype=self.dtype)
        calls = self.right(dense_rivals(problem, full), problem.reference(full))
        facts = []
        for number, sparsity in enumerate(SPARSITIES):
            shape = (layer.out, layer.features)
            weight = random_block_sparse(shape, block, 1 - sparsity, dtype=self.dtype, device=self.device, seed=number)
            found = tune(weight, tokens, ("forward",))["forward"]
            made = {"sparse": self.sparse(problem, weight)}
            if not self.gpu and (call := self.frozen(problem, weight, found.choice)):
                made["frozen"] = call
            if self.gpu and sparsity in BSR_SPARSITIES:
                made |= self.bsr(problem, weight)
            made = self.right(made, problem.reference(weight.to_dense()))
            calls |= {f"{name} {sparsity}": call for name, call in made.items()}
            facts.append(
                {
                    "sparsity": sparsity,
                    "kept_blocks": len(weight.cols),
                    "runs": found.choice.backend,
                    "config": None if found.choice.config is None else str(found.choice.config),
                    "tuned_us": {name: round(us, 2) for name, us in found.times_us.items()},
                    "kept_flops": flops(problem, weight),
                    "least_ms": least_ms(self.ceilings, problem, weight),
                }
            )
        subjects: dict[str, Subject] = {f"eager {name}": call for name, call in calls.items()}
        if self.gpu:
            subjects |= self.graphs(calls)
        run = time_interleaved(dict(subjects), device=self.device, rounds=self.rounds, warmup_seconds=0.05 if self.gpu else 0.3)
        return [row(fact, mode, run) for fact in facts for mode in ("eager", "graph") if f"{mode} dense" in run.subjects]

    def sparse(self, problem: Problem, weight: BlockSparseMatrix) -> Call:
        return lambda: linear(problem.x, weight, problem.bias, "gelu" if problem.layer.gelu else None, problem.residual)

    def frozen(self, problem: Problem, weight: BlockSparseMatrix, choice: Choice) -> Call | None:
        """As a frozen model calls it; None: as a plain nn.Linear."""
        product = backends.bound(choice, weight)
        if product is None:
            return None
        layer = FrozenLinear(product, problem.bias, *weight.shape)
        return lambda: layer(problem.x, "gelu" if problem.layer.gelu else None, None, problem.residual)

    def bsr(self, problem: Problem, weight: BlockSparseMatrix) -> dict[str, Call]:
        try:
            return bsr_rivals(problem, weight, tuned=problem.layer.name in ("fc1", "fc2"))
        except Exception as error:  # of a private function of torch's
            self.failures.add(f"bsr: {type(error).__name__}: {error}")
            return {}

    def right(self, calls: dict[str, Call], reference: Tensor) -> dict[str, Call]:
        """The calls that compute what they should. Rivals that do not are left out, and it is said why."""
        found = {}
        for name, call in calls.items():
            why = None if name in OURS else works(call)
            if why is None:
                error = float((call().double() - reference).norm() / reference.norm())
                why = None if error < TOLERANCES[self.dtype] else f"wrong result, relative error {error:.1e}"
            if why is None:
                found[name] = call
            elif name in OURS:
                raise SystemExit(f"{name}: {why}")
            else:
                self.failures.add(f"{name}: {why}")
        return found

    def graphs(self, calls: dict[str, Call]) -> dict[str, Subject]:
        """Their CUDA graphs, which share memory: they are replayed one after the other, and nobody reads what they compute."""
        pool, made = torch.cuda.graph_pool_handle(), dict[str, Subject]()
        for name, call in calls.items():
            graph = torch.cuda.CUDAGraph()
            if why := works(partial(self.capture, graph, pool, call)):
                if name.split()[0] in OURS:
                    raise SystemExit(f"{name} cannot be captured in a CUDA graph: {why}")
                self.failures.add(f"{name}, CUDA graph: {why}")
            else:
                made[f"graph {name}"] = graph.replay
        return made

    @staticmethod
    def capture(graph: torch.cuda.CUDAGraph, pool: Any, call: Call) -> None:
        with torch.cuda.graph(graph, pool=pool):
            call()


def row(fact: Row, mode: str, run: TimingRun) -> Row:
    """One sparsity, one mode; times in milliseconds, None for what is not there."""
    sparsity = fact["sparsity"]

    def ms(name: str) -> float | None:
        timing = run.subjects.get(f"{mode} {name}")
        return None if timing is None else round(timing.median_ms, 5)

    sparse_ms = run.subjects[f"{mode} sparse {sparsity}"].median_ms
    dense = {name: time for name in DENSE if (time := ms(name))}
    fastest = min(dense, key=lambda name: dense[name])
    ratio = run.ratio(f"{mode} {fastest}", f"{mode} sparse {sparsity}")
    return fact | {
        "mode": mode,
        "sparse_ms": round(sparse_ms, 5),
        **{f"{name}_ms": ms(name) for name in DENSE},
        "frozen_ms": ms(f"frozen {sparsity}"),
        "bsr_ms": ms(f"bsr {sparsity}"),
        "bsr_tuned_ms": ms(f"bsr tuned {sparsity}"),
        "fastest_dense": fastest,
        "ratio": round(ratio.value, 3),
        "ratio_low": round(ratio.low, 3),
        "ratio_high": round(ratio.high, 3),
        "ratio_to_linear": round(run.ratio(f"{mode} dense", f"{mode} sparse {sparsity}").value, 3),
        "tflops": round(fact["kept_flops"] / sparse_ms / 1e9, 3),
        "roofline": round(fact["least_ms"] / sparse_ms, 3),
        "least_ms": round(fact["least_ms"], 5),
        "variation": round(run.subjects[f"{mode} sparse {sparsity}"].variation, 3),
        "foreign_load": None if run.foreign_load is None else round(run.foreign_load, 3),
    }


HEADER = (
    f"{'model':>7} {'layer':>5} {'tokens':>6} {'block':>8} {'gone':>5} {'mode':>6} {'fastest dense, ms':>18} {'sparse ms':>9}"
    f" {'ratio (95 %)':>21} {'TFLOP/s':>8} {'roofline':>9} {'bsr ms':>9} runs"
)


def show(rows: Iterable[Row]) -> None:
    for r in rows:
        which = f"{r['model']:>7} {r['layer']:>5} {r['tokens']:>6} {r['block']:>8} {r['sparsity']:5.0%} {r['mode']:>6}"
        ratio = f"{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})"
        times = f"{r['fastest_dense']:>8} {r[r['fastest_dense'] + '_ms']:9.4f} {r['sparse_ms']:9.4f} {ratio:>21}"
        bsr = r["bsr_tuned_ms"] or r["bsr_ms"]
        print(f"{which} {times} {r['tflops']:8.3f} {r['roofline']:9.0%} {bsr or '-':>9} {r['runs']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, on a CPU float32")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=4.0, help="no further part of the grid is begun that would go beyond")
    parser.add_argument("--full", action="store_true", help="the whole grid, however long it takes")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    started, rows, grid = time.monotonic(), list[Row](), panels(device.type)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        os.environ["LPVIT_CACHE"] = folder  # what is tuned here, for random weights, is not the user's
        bench = Bench(device, dtype, args.rounds)
        print(HEADER)
        seen = set[tuple[int, int]]()
        longest = {True: 0.0, False: 0.0}  # seconds of a panel, by whether its block is new: its kernels must be compiled
        for done, panel in enumerate(grid):
            begun, new = time.monotonic(), panel.block not in seen
            if done and not args.full and begun - started + (longest[new] or longest[True]) > 60 * args.minutes:
                grid = grid[:done]
                break
            made = bench.panel(panel)
            show(made)
            rows += made
            seen.add(panel.block)
            longest[new] = max(longest[new], time.monotonic() - begun)
    if args.output and rows:
        draw(rows, args.output.with_suffix(".svg"))
    publish(
        "bench_kernels",
        ("torch", "triton"),
        args.output,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        dtype=str(dtype).removeprefix("torch."),
        threads=args.threads,
        rounds=args.rounds,
        peak_tflops=round(bench.ceilings.flops / 1e12, 3),
        bandwidth_gb_s=round(bench.ceilings.bandwidth / 1e9, 1),
        minutes=round((time.monotonic() - started) / 60, 1),
        panels=len(grid),
        panels_left_out=len(panels(device.type)) - len(grid),
        rivals_that_failed=sorted(bench.failures),
        crossovers=crossovers(rows),
        rows=rows,
    )


if __name__ == "__main__":
    main()
