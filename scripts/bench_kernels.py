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

The last line of stdout is the result as JSON; a picture of the crossovers goes beside --output.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from kernel_rivals import Call, Layer, Problem, bsr_rivals, dense_rivals, layers_of, works
from lpvit_kernels import BlockSparseMatrix, linear, tune
from lpvit_kernels.random import random_block_sparse
from results import publish
from torch import Tensor

from lpvit_cli.measure.machine import cpu_name
from lpvit_cli.measure.timing import Subject, TimingRun, time_interleaved

# Each axis in the order of interest.
MODELS = {"DeiT-B": 768, "DeiT-S": 384, "ViT-L": 1024}
BLOCKS = ((64, 64), (128, 32), (32, 32), (128, 64), (64, 32), (128, 16), (128, 128), (16, 16))
IMAGES = {"cuda": (256, 64, 1), "cpu": (1, 8)}
TOKENS = 197  # of an image
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8)
BSR_SPARSITIES = (0.5, 0.7, 0.8)
DENSE = ("dense", "compiled", "mkldnn")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}

Row = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """The layers of a block at all sparsities: a line of the picture."""

    model: str
    images: int
    block: tuple[int, int]


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in a large product [FLOP/s] and a large copy [byte/s]."""

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Ceilings:
        gpu = device.type == "cuda"
        size, length = (8192, 2**29) if gpu else (1024, 2**25)
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        source, target = torch.ones(2, length, device=device, dtype=dtype)
        subjects = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
        run = time_interleaved(subjects, device=device, rounds=10, warmup_seconds=0.5)
        product_ms, copy_ms = (run.subjects[name].percentiles.p10 for name in subjects)
        return cls(2e3 * size**3 / product_ms, 2e3 * length * source.element_size() / copy_ms)

    def least_ms(self, problem: Problem, weight: BlockSparseMatrix) -> float:
        """The roofline: of the kept blocks, and of reading and writing everything once."""
        tensors = (problem.x, problem.bias, weight.values) + ((problem.residual,) if problem.residual is not None else ())
        written = len(problem.x) * problem.layer.out * problem.x.element_size()
        moved = written + sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return 1e3 * max(flops(problem, weight) / self.flops, moved / self.bandwidth)


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

    def panel(self, panel: Panel) -> list[Row]:
        rows = []
        for layer in layers_of(MODELS[panel.model]):
            about = {"model": panel.model, "layer": layer.name, "out": layer.out, "in": layer.features}
            about |= {"tokens": panel.images * TOKENS, "block": "x".join(map(str, panel.block))}
            rows += [about | row for row in self.layer(layer, panel.images * TOKENS, panel.block)]
        return rows

    def layer(self, layer: Layer, tokens: int, block: tuple[int, int]) -> list[Row]:
        """One interleaved run: dense, and sparse at each sparsity."""
        problem = Problem.random(layer, tokens, self.device, self.dtype)
        full = torch.randn(layer.out, layer.features, device=self.device, dtype=self.dtype)
        calls, failures = dense_rivals(problem, full), dict[str, str]()
        self.check(calls, problem.reference(full), failures)
        facts = []
        for number, sparsity in enumerate(SPARSITIES):
            shape = (layer.out, layer.features)
            weight = random_block_sparse(shape, block, 1 - sparsity, dtype=self.dtype, device=self.device, seed=number)
            found = tune(weight, tokens, ("forward",))["forward"]
            made = {f"sparse {sparsity}": self.sparse(problem, weight)}
            if self.gpu and sparsity in BSR_SPARSITIES:
                try:
                    bsr = bsr_rivals(problem, weight, tuned=layer.name in ("fc1", "fc2"))
                    made |= {f"{name} {sparsity}": call for name, call in bsr.items()}
                except Exception as error:  # a private function of another library
                    failures[f"bsr {sparsity}"] = f"{type(error).__name__}: {error}"
            self.check(made, problem.reference(weight.to_dense()), failures)
            calls |= made
            facts.append(
                {
                    "sparsity": sparsity,
                    "kept_blocks": len(weight.cols),
                    "runs": found.choice.backend,
                    "config": None if found.choice.config is None else str(found.choice.config),
                    "tuned_us": {name: round(us, 2) for name, us in found.times_us.items()},
                    "kept_flops": flops(problem, weight),
                    "least_ms": self.ceilings.least_ms(problem, weight),
                    "failures": {name: why for name, why in failures.items() if str(sparsity) in name or name in DENSE},
                }
            )
        subjects: dict[str, Subject] = {f"eager {name}": call for name, call in calls.items()}
        if self.gpu:
            subjects |= self.graphs(calls)
        run = time_interleaved(dict(subjects), device=self.device, rounds=self.rounds, warmup_seconds=0.05 if self.gpu else 0.3)
        return [row(fact, mode, run) for fact in facts for mode in ("eager", "graph") if f"{mode} dense" in run.subjects]

    def sparse(self, problem: Problem, weight: BlockSparseMatrix) -> Call:
        return lambda: linear(problem.x, weight, problem.bias, "gelu" if problem.layer.gelu else None, problem.residual)

    def check(self, calls: dict[str, Call], reference: Tensor, failures: dict[str, str]) -> None:
        """Rivals that fail are left out, and it is said why; wrong numbers end it all."""
        for name in list(calls):
            if not name.startswith("sparse") and (why := works(calls[name])):
                failures[name] = why
                del calls[name]
                continue
            error = float((calls[name]().double() - reference).norm() / reference.norm())
            if not error < TOLERANCES[self.dtype]:
                raise SystemExit(f"{name}: wrong result, relative error {error:.1e}")

    def graphs(self, calls: dict[str, Call]) -> dict[str, Subject]:
        """Their CUDA graphs, which share memory: they are replayed one after the other, and nobody reads what they compute."""
        pool, made = torch.cuda.graph_pool_handle(), dict[str, Subject]()
        for name, call in calls.items():
            graph = torch.cuda.CUDAGraph()

            def capture(graph: torch.cuda.CUDAGraph = graph, call: Call = call) -> None:
                with torch.cuda.graph(graph, pool=pool):
                    call()

            why = works(capture)
            if why is None:
                made[f"graph {name}"] = graph.replay
            elif name.startswith("sparse") or name == "dense":
                raise SystemExit(f"{name} cannot be captured in a CUDA graph: {why}")
        return made


def row(fact: Row, mode: str, run: TimingRun) -> Row:
    """One sparsity, one mode; times in milliseconds, None for what is not there."""
    sparsity = fact["sparsity"]

    def ms(name: str) -> float | None:
        timing = run.subjects.get(f"{mode} {name}")
        return None if timing is None else round(timing.percentiles.p50, 5)

    sparse_ms = run.subjects[f"{mode} sparse {sparsity}"].percentiles.p50
    dense = {name: time for name in DENSE if (time := ms(name))}
    fastest = min(dense, key=lambda name: dense[name])
    ratio = run.ratio(f"{mode} {fastest}", f"{mode} sparse {sparsity}")
    return fact | {
        "mode": mode,
        "sparse_ms": round(sparse_ms, 5),
        **{f"{name}_ms": ms(name) for name in DENSE},
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


def show(rows: Iterable[Row]) -> None:
    for r in rows:
        which = f"{r['model']:>7} {r['layer']:>5} {r['tokens']:>6} {r['block']:>8} {r['sparsity']:5.0%} {r['mode']:>6}"
        times = f"{r['dense_ms']:9.4f} {r['sparse_ms']:9.4f} {r['ratio']:6.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})"
        bsr = r["bsr_tuned_ms"] or r["bsr_ms"]
        print(f"{which} {times} {r['tflops']:8.3f} {r['roofline']:9.0%} {bsr or '-':>9} {r['runs']}", flush=True)


def whole(rows: list[Row], time_of: str, **which: object) -> list[tuple[float, float]]:
    """Sparsity, and how much faster than the fastest dense ones all layers of a block are together, where all were timed."""
    points = []
    for sparsity in SPARSITIES:
        mine: list[Any] = [
            r for r in rows if r["sparsity"] == sparsity and all(r[key] == value for key, value in which.items())
        ]
        if mine and all(r[time_of] for r in mine):
            dense = sum(r[f"{r['fastest_dense']}_ms"] for r in mine)
            points.append((sparsity, dense / sum(r[time_of] for r in mine)))
    return points


def crossover(points: list[tuple[float, float]]) -> float | None:
    """The sparsity above which sparse is faster, between points by a straight line; None: it never is."""
    slower = [number for number, (_, ratio) in enumerate(points) if ratio <= 1]
    if not slower:
        return points[0][0]
    if slower[-1] == len(points) - 1:
        return None
    (x0, y0), (x1, y1) = points[slower[-1] : slower[-1] + 2]
    return round(x0 + (1 - y0) / (y1 - y0) * (x1 - x0), 3)


def crossovers(rows: list[Row]) -> list[Row]:
    keys = ("model", "tokens", "block", "mode")
    found = dict.fromkeys(tuple(r[key] for key in keys) for r in rows)
    which = [dict(zip(keys, values, strict=True)) for values in found]
    return [one | {"sparsity": crossover(whole(rows, "sparse_ms", **one))} for one in which]


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    mode = rows[-1]["mode"]
    models, tokens = (list(dict.fromkeys(r[key] for r in rows)) for key in ("model", "tokens"))
    size = (4.5 * len(tokens), 3.6 * len(models))
    figure, grid = pyplot.subplots(
        len(models), len(tokens), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for (y, model), (x, count) in product(enumerate(models), enumerate(tokens)):
        axes = grid[y][x]
        axes.axhline(1, color="#6b7280", linewidth=1)
        axes.plot([100 * s for s in SPARSITIES], [1 / (1 - s) for s in SPARSITIES], ":", color="#6b7280", label="ideal")
        for block in dict.fromkeys(r["block"] for r in rows):
            which = {"model": model, "tokens": count, "block": block, "mode": mode}
            for time_of, style, label in (("sparse_ms", "o-", block), ("bsr_ms", "x--", f"PyTorch BSR, {block}")):
                if points := whole(rows, time_of, **which):
                    axes.plot([100 * s for s, _ in points], [ratio for _, ratio in points], style, label=label)
        axes.set(title=f"{model}, {count} tokens", xlabel="blocks removed (%)", ylabel="times faster than the fastest dense")
        axes.legend(frameon=False, fontsize=7)
    figure.suptitle(f"All linear layers of a transformer block, {mode}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


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
        print(
            "  model layer tokens    block  gone   mode  dense ms sparse ms  ratio (95 %)      TFLOP/s  roofline    bsr ms runs"
        )
        seen, longest = (
            set[tuple[int, int]](),
            {True: 0.0, False: 0.0},
        )  # whether the block is new, and kernels must be compiled
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
        crossovers=crossovers(rows),
        rows=rows,
    )


if __name__ == "__main__":
    main()
