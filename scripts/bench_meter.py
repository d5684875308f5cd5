"""How right the energy meter is, where the truth is known, and what its power trace costs.

    python scripts/bench_meter.py --output benchmarks/results/meter.json

A made-up board draws power that flickers; its counter ticks every 100 ms and its sensor sees a part of each tick. `coverage`:
of 1,000 experiments with six trials, how many intervals hold the true ratio of energies. `overhead`: a loop that keeps a core
busy, with and without the thread that samples power, in turns. The last line of stdout is the result as JSON.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from results import publish

from lpvit_cli.measure.energy.trace import PERIOD_S, PowerTrace, in_background
from lpvit_cli.measure.statistics import paired_ratio

sys.path.append(str(Path(__file__).parent.parent / "tests" / "measure"))
from synthetic import Board, coverage

WATTS, CALL_S, IMAGES = 300.0, 0.005, 8


def flicker(seed: int) -> Callable[[float], float]:
    """Mean 1, of three periods drawn at random between 20 ms and 0.3 s: over 10 s it is even."""
    generator = random.Random(seed)
    periods = [math.exp(generator.uniform(math.log(0.02), math.log(0.3))) for _ in range(3)]
    phases = [generator.uniform(0, 2 * math.pi) for _ in range(3)]
    return lambda t: 1 + sum(0.2 * math.sin(2 * math.pi * t / p + f) for p, f in zip(periods, phases, strict=True))


def errors(seen: float, boards: int) -> list[float]:
    """Relative error of J/image, the median of six windows of 10 s, for boards that flicker differently."""
    found = []
    for seed in range(boards):
        board = Board(seen=seen, shape=flicker(seed))

        def call(board: Board = board) -> None:
            board.spend(CALL_S, WATTS)

        energy = board.measure({"dense": call}, IMAGES).subjects["dense"]
        spent = WATTS * CALL_S / IMAGES
        found.append(abs(energy.joules_per_image / spent - 1))
    return found


def busy(steps: int = 3_000_000) -> float:
    started, total = time.perf_counter(), 0
    for step in range(steps):
        total += step
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boards", type=int, default=20)
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    by_seen = {f"{seen:.0%}": errors(seen, args.boards) for seen in (1.0, 0.25)}
    for seen, found in by_seen.items():
        print(
            f"sensor sees {seen}: error of J/image {sum(found) / len(found):.3%} on average, {max(found):.3%} at most",
            flush=True,
        )
    held = coverage(args.experiments)
    print(f"interval holds the true ratio in {held:.1%} of {args.experiments} experiments", flush=True)

    times: dict[str, list[float]] = {"without": [], "with": []}
    trace = PowerTrace(lambda: 1.0, time.monotonic)
    for turn in range(args.turns):
        for name in ("without", "with")[:: 1 if turn % 2 else -1]:
            if name == "without":
                times[name].append(busy())
            else:
                with in_background(trace.sample):
                    times[name].append(busy())
    ratio = paired_ratio(times["with"], times["without"])
    print(f"trace thread, every {1000 * PERIOD_S:.0f} ms: {ratio.value:.4f}x ({ratio.low:.4f} to {ratio.high:.4f})", flush=True)
    publish(
        "meter",
        ("lpvit",),
        args.output,
        window_s=10.0,
        tick_s=0.1,
        errors=by_seen,
        experiments=args.experiments,
        coverage=held,
        overhead={"ratio": ratio.value, "low": ratio.low, "high": ratio.high},
    )


if __name__ == "__main__":
    main()
