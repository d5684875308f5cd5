"""What M-FAC costs: CPU time and memory over grids of d weights and m gradients, and how both grow, beside the paper's orders.

    python scripts/bench_mfac.py --output benchmarks/results/mfac_cpu.json

Static (FisherInverse): O(d m^2) to set up, O(d m) a product, O(m) an element. Sliding (SlidingFisherInverse): O(d m + m^3)
to push a gradient, O(d m + m^2) a product. Memory of both: O(d m). Growth is the exponents of d and m in cost ~ d^a m^b, fitted
by least squares in logarithms: on a grid with m much smaller than d, and again where m is large. The orders are of arithmetic:
the overhead of calls lifts small sizes above them, so that growth can come out lower. Times are CPU time of one thread, which
other processes change least. The last line of stdout is the result as JSON.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from math import log
from pathlib import Path

import torch
from results import publish
from torch import Tensor

from lpvit_cli.curvature.mfac import FisherInverse, SlidingFisherInverse

DAMPING = 1e-3
FEW = [(d, m) for d in (16384, 32768, 65536, 131072) for m in (16, 32, 64, 128)]  # d much larger than m
MANY_STATIC = [(4096, m) for m in (256, 512, 1024, 2048)]
MANY_SLIDING = [(1024, m) for m in (256, 512, 1024, 2048)]


def cpu_seconds(work: Callable[[], object], at_least: float) -> float:
    """Median CPU time of one call, over at least three calls and `at_least` seconds."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least:
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return statistics.median(times)


def held(of: object) -> int:
    """Bytes of all tensors an object keeps."""
    return sum(t.untyped_storage().nbytes() for t in vars(of).values() if isinstance(t, torch.Tensor))


def filled(gradients: Tensor) -> SlidingFisherInverse:
    fisher = SlidingFisherInverse(*gradients.shape, DAMPING)
    fisher.refill(gradients, len(gradients))
    return fisher


def few(d: int, m: int, at_least: float) -> dict[str, float]:
    gradients, v = torch.randn(m, d), torch.randn(d)
    static, sliding = FisherInverse(gradients, DAMPING), filled(gradients)
    error = (sliding.product(v) - static.product(v)).norm() / static.product(v).norm()
    if not error < 1e-4:
        raise SystemExit(f"static and sliding products differ by {error:.1e} at d = {d}, m = {m}")
    return {
        "static set-up": cpu_seconds(lambda: FisherInverse(gradients, DAMPING), at_least),
        "static product": cpu_seconds(lambda: static.product(v), at_least),
        "static bytes": held(static),
        "sliding push": cpu_seconds(lambda: sliding.push(gradients[0]), at_least),
        "sliding product": cpu_seconds(lambda: sliding.product(v), at_least),
        "sliding bytes": held(sliding),
    }


def many_static(d: int, m: int, at_least: float) -> dict[str, float]:
    static = FisherInverse(torch.randn(m, d), DAMPING)
    return {"static element": cpu_seconds(lambda: static.element(1, d - 1), at_least)}


def many_sliding(d: int, m: int, at_least: float) -> dict[str, float]:
    gradients, v = torch.randn(m, d), torch.randn(d)
    sliding = filled(gradients)
    return {
        "sliding push": cpu_seconds(lambda: sliding.push(gradients[0]), at_least),
        "sliding product": cpu_seconds(lambda: sliding.product(v), at_least),
    }


GRIDS = {  # what is measured, where, and the exponents of d and m expected there; None: d is fixed
    "m much smaller than d": (
        few,
        FEW,
        {
            "static set-up": (1, 2),
            "static product": (1, 1),
            "static bytes": (1, 1),
            "sliding push": (1, 1),
            "sliding product": (1, 1),
            "sliding bytes": (1, 1),
        },
    ),
    "many gradients, static": (many_static, MANY_STATIC, {"static element": (None, 1)}),
    "more gradients than weights, sliding": (
        many_sliding,
        MANY_SLIDING,
        {"sliding push": (None, 3), "sliding product": (None, 2)},
    ),
}


def growth(rows: list[dict[str, float]], quantity: str) -> tuple[float, float]:
    """a and b of quantity ~ d^a m^b; a = 0 where d is fixed."""
    logs = torch.tensor([[1.0, log(row["m"]), log(row["d"]), log(row[quantity])] for row in rows], dtype=torch.float64)
    known = logs[:, :3] if len({row["d"] for row in rows}) > 1 else logs[:, :2]
    _, b, *a = torch.linalg.lstsq(known, logs[:, 3:]).solution[:, 0].tolist()
    return a[0] if a else 0.0, b


def shown(quantity: str, value: float) -> str:
    return f"{value / 2**20:9.2f} MiB" if quantity.endswith("bytes") else f"{value * 1e3:10.4f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.1, help="least CPU time spent on each number")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    grids = {}
    for title, (bench, sizes, expected) in GRIDS.items():
        print(f"{title}\n{'d':>7} {'m':>5} " + " ".join(f"{quantity:>15}" for quantity in expected))
        rows = []
        for d, m in sizes:
            rows.append({"d": d, "m": m, **bench(d, m, args.seconds)})
            print(f"{d:7} {m:5} " + " ".join(f"{shown(q, rows[-1][q]):>15}" for q in expected), flush=True)
        exponents = {}
        for quantity, (of_d, of_m) in expected.items():
            a, b = growth(rows, quantity)
            measured, paper = (f"m^{b:.2f}", f"m^{of_m}") if of_d is None else (f"d^{a:.2f} m^{b:.2f}", f"d^{of_d} m^{of_m}")
            print(f"{quantity:>15} grows as {measured:14} expected {paper}")
            exponents[quantity] = {"measured": measured, "expected": paper}
        grids[title] = {"growth": exponents, "rows": rows}
        print()
    publish(
        "bench_mfac", ("torch",), args.output, device="cpu", threads=1, damping=DAMPING, time_unit="s of CPU time", grids=grids
    )


if __name__ == "__main__":
    main()
