"""The README's picture, from committed results: accuracy and speed by the share of weights removed.

    python scripts/plot_overview.py

Left: one-shot top-1 by method (benchmarks/results/compare_methods.json). Right: exported files in onnxruntime
(benchmarks/results/export_cpu.json), whose weights are random: speed does not depend on them, and they have no accuracy.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
RESULTS, PICTURE = ROOT / "benchmarks" / "results", ROOT / "docs" / "overview.svg"
METHODS = {"obs": "obs (default)", "block Fisher": "block Fisher", "lpvit": "lpvit", "magnitude, global": "magnitude"}
MODELS = {"digits_vit": "-", "digits_swin": "--"}


def main() -> None:
    plt.rcParams |= {"svg.hashsalt": "lpvit", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    accuracy(left, _rows("compare_methods"))
    speed(right, _rows("export_cpu"))
    figure.savefig(PICTURE, metadata={"Date": None})


def accuracy(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Means over seeds; the dashed lines are the Swin."""
    for colour, (method, label) in enumerate(METHODS.items()):
        for model, style in MODELS.items():
            mine = [row for row in rows if row["method"] == method and row["model"] == model]
            points = sorted((100 * row["sparsity"], mean(row["one_shot"])) for row in mine)
            name = label if style == "-" else None
            axes.plot(*zip(*points, strict=True), style, color=f"C{colour}", marker="o", markersize=3, label=name)
    axes.set(title="Accuracy: small ViT (solid), small Swin (dashed)", xlabel="weights removed, %", ylabel="one-shot top-1, %")
    axes.set(xlim=(25, 93), ylim=(0, 103))
    axes.legend(frameon=False, loc="lower left")


def speed(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """DeiT-S by sparsity, with 95 % intervals; DeiT-B where it was measured."""
    alike = [row for row in rows if row["threads"] == 1 and row["batch"] == 1 and row["block"] == "128x64"]
    small = [row for row in alike if row["model"] == "DeiT-S" and row["file"] == "rows"]
    _with_intervals(axes, small, "C0", "-", "DeiT-S, float32")
    base = [row for row in alike if row["model"] == "DeiT-B"]
    _with_intervals(axes, [row for row in base if row["file"] == "auto"], "C0", "--", "DeiT-B, float32")
    _with_intervals(axes, [row for row in base if row["file"] == "auto int8"], "C3", "--", "DeiT-B, int8")
    dense = mean(row["ratio"] for row in base if row["file"] == "dense int8")
    axes.axhline(dense, color="C3", linewidth=0.8, linestyle=":", label="DeiT-B, int8, dense")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(
        title="Speed: exported files, onnxruntime, 1 thread", xlabel="weights removed, %", ylabel="times the dense float32 file"
    )
    axes.set(xlim=(25, 93), ylim=(0, 5))
    axes.legend(frameon=False, loc="upper left", ncols=2)


def _with_intervals(axes: Axes, rows: list[dict[str, Any]], colour: str, style: str, label: str) -> None:
    rows = sorted(rows, key=lambda row: float(row["sparsity"]))
    x, y = [100 * row["sparsity"] for row in rows], [row["ratio"] for row in rows]
    below = [row["ratio"] - row["ratio_low"] for row in rows]
    above = [row["ratio_high"] - row["ratio"] for row in rows]
    axes.errorbar(x, y, yerr=[below, above], color=colour, linestyle=style, marker="o", markersize=3, capsize=2, label=label)


def _rows(benchmark: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{benchmark}.json").read_text())["rows"]
    return rows


if __name__ == "__main__":
    main()
