"""From which sparsity on block-sparse layers are faster than dense ones: numbers and a picture, of bench_kernels.py's rows."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def whole(rows: list[Row], time_of: str, **which: object) -> list[tuple[float, float]]:
    """Sparsity, and how much faster than the fastest dense ones all layers of a block are together, where all were timed."""
    points = []
    for sparsity in dict.fromkeys(r["sparsity"] for r in rows):
        which["sparsity"] = sparsity
        mine = [r for r in rows if all(r[key] == value for key, value in which.items())]
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
    models, tokens, sparsities = (list(dict.fromkeys(r[key] for r in rows)) for key in ("model", "tokens", "sparsity"))
    size = (4.5 * len(tokens), 3.6 * len(models))
    figure, grid = pyplot.subplots(
        len(models), len(tokens), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for (y, model), (x, count) in product(enumerate(models), enumerate(tokens)):
        axes = grid[y][x]
        axes.axhline(1, color="#6b7280", linewidth=1)
        axes.plot([100 * s for s in sparsities], [1 / (1 - s) for s in sparsities], ":", color="#6b7280", label="ideal")
        for number, block in enumerate(dict.fromkeys(r["block"] for r in rows)):
            which = {"model": model, "tokens": count, "block": block, "mode": mode}
            for time_of, style, label in (("sparse_ms", "o-", block), ("bsr_ms", "x--", f"PyTorch BSR, {block}")):
                if points := whole(rows, time_of, **which):
                    axes.plot(
                        [100 * s for s, _ in points], [ratio for _, ratio in points], style, color=f"C{number}", label=label
                    )
        axes.set(title=f"{model}, {count} tokens", xlabel="blocks removed (%)", ylabel="times faster than the fastest dense")
        axes.legend(frameon=False, fontsize=7)
    figure.suptitle(f"All linear layers of a transformer block, {mode}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
