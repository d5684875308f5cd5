"""Pictures for the HTML report, as inline SVG; matplotlib is an optional package."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from lpvit_cli.bench.results import BatchBench, LayersBench
from lpvit_cli.measure.energy.run import EnergyRun
from lpvit_cli.measure.statistics import paired_ratio
from lpvit_cli.measure.timing import Timing
from lpvit_cli.report.schema import FinetuneReport, GradualReport, LayerReport, PruneReport, SweepReport
from lpvit_cli.tasks.quality import Figure

COLORS = {"dense": "#6b7280", "masked-dense": "#d97706", "sparse": "#2563eb"}
OTHERS = [
    *("#0891b2", "#7c3aed", "#059669", "#db2777", "#92400e", "#1e3a8a"),
    *("#a3a3a3", "#65a30d", "#b91c1c", "#0f766e", "#c026d3", "#f59e0b"),
]
WIDTH = 7.5  # inches; readable on a phone too


def latency_picture(batch: BatchBench) -> str:
    """Latency distributions of one batch size: the share of calls that took at most so long, one line a subject. Where single
    calls are not known, the dashed line is the means of the rounds."""
    figure, axes = _figure(WIDTH, 3.6)
    colors = _colors(batch)
    for name, timing in batch.timing.subjects.items():
        times, shares = distribution(timing)
        median = timing.percentiles.p50 if timing.percentiles else timing.median_ms
        what = "" if timing.percentiles else f", means of {timing.calls_per_sample} calls"
        axes.plot(
            times,
            shares,
            label=f"{name}{what}, median {median:.2f} ms",
            color=colors[name],
            linewidth=2,
            linestyle="-" if timing.percentiles else "--",
        )
        axes.axvline(median, color=colors[name], linewidth=0.8, linestyle=":")
    axes.set(xlabel="latency of one call (ms)", ylabel="calls at most this long (%)", ylim=(0, 101))
    axes.set_title(f"Latency, {batch.title}", loc="left")
    _legend_below(axes)
    return _svg(figure)


def distribution(timing: Timing) -> tuple[list[float], list[float]]:
    """Milliseconds, and the percentage of calls that took at most so long; of the rounds' means where calls are not known."""
    times = timing.quantiles_ms or sorted(timing.samples_ms)
    return times, [100 * k / (len(times) - 1) for k in range(len(times))]


def power_picture(batch: BatchBench, energy: EnergyRun) -> str:
    """Power over time, the windows that were measured shaded; subjects took turns."""
    figure, axes = _figure(WIDTH, 3.6)
    colors = _colors(batch)
    for name, subject in energy.subjects.items():
        for window in subject.windows:
            axes.axvspan(window.begin_s, window.end_s, color=colors[name], alpha=0.15, linewidth=0)
        if subject.trace:
            axes.plot(subject.trace.seconds, subject.trace.watts, ".", markersize=2, color=colors[name])
        axes.plot([], [], color=colors[name], linewidth=2, label=f"{name}, {subject.average_w:.0f} W")
    if energy.idle_w is not None:
        axes.axhline(energy.idle_w, color="#111827", linewidth=0.8, linestyle="--", label=f"idle, {energy.idle_w:.0f} W")
    axes.set(xlabel="seconds; shaded: measured windows", ylabel="power (W)", ylim=(0, None))
    axes.set_title(f"Power, {batch.title}", loc="left")
    _legend_below(axes)
    return _svg(figure)


def energy_picture(batch: BatchBench, energy: EnergyRun) -> str:
    """Energy of an image, the median over trials with its 95 % interval; what the idle device would draw is light."""
    figure, axes = _figure(WIDTH, 0.9 + 0.4 * len(energy.subjects))
    colors = _colors(batch)
    for name, subject in energy.subjects.items():
        trials = subject.trials_joules_per_image
        joules = paired_ratio(trials, [1.0] * len(trials))
        reach = ([joules.value - joules.low], [joules.high - joules.value])
        axes.barh(name, joules.value, xerr=reach, capsize=4, color=colors[name], alpha=0.4)
        axes.barh(name, subject.above_idle_joules_per_image, color=colors[name])
    axes.set(xlabel="joules per image; dark: above idle")
    axes.invert_yaxis()
    axes.set_title(f"Energy, {batch.title}", loc="left")
    return _svg(figure)


def layers_picture(batch: BatchBench, bench: LayersBench) -> str:
    """Time of every linear layer, dense and sparse, and of all else."""
    figure, axes = _figure(WIDTH, 1 + 0.3 * (len(bench.layers) + 1))
    names = [*(layer.name for layer in bench.layers), "all else"]
    for offset, label, times in (
        (-0.2, "dense", [*(layer.ms_dense for layer in bench.layers), bench.rest_ms_dense]),
        (0.2, "sparse", [*(layer.ms for layer in bench.layers), bench.rest_ms]),
    ):
        places = [place + offset for place in range(len(names))]
        axes.barh(places, times, height=0.38, color=COLORS[label], label=label)
    least = [layer.roofline * layer.ms for layer in bench.layers]
    axes.plot(least, [place + 0.2 for place in range(len(least))], "|", color="#111827", markersize=8, label="roofline")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="ms in a call", ylim=(len(names) - 0.5, -0.5))
    axes.set_title(f"Layers, {batch.title}", loc="left")
    _legend_below(axes)
    return _svg(figure)


def _legend_below(axes: Any) -> None:
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.55 / axes.figure.get_figheight()), ncols=2, fontsize=9)


def _colors(batch: BatchBench) -> dict[str, str]:
    others = iter(OTHERS)
    return {name: COLORS.get(name) or next(others) for name in batch.timing.subjects}


def blocks_picture(layers: list[LayerReport]) -> str:
    """Kept blocks of every layer as a heat map: a cell is a block, dark where it is kept."""
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, grid = _figure(2.6 * columns, 2.2 * rows, rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, layer in zip(grid.flat, layers, strict=False):
        axes.set_axis_on()
        kept = [[cell == "#" for cell in row] for row in layer.kept_map]
        axes.imshow(kept, cmap="Blues", vmin=-0.15, vmax=1.15, aspect="auto", interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.hlines([i - 0.5 for i in range(1, len(kept))], -0.5, len(kept[0]) - 0.5, colors="white", linewidth=0.4)
        axes.vlines([j - 0.5 for j in range(1, len(kept[0]))], -0.5, len(kept) - 0.5, colors="white", linewidth=0.4)
        axes.set_title(f"{layer.name}\n{layer.kept_fraction:.0%} of {layer.blocks} blocks", fontsize=8, loc="left")
    return _svg(figure)


def sweep_picture(report: SweepReport) -> str:
    """One-shot accuracy, and speed-up with its interval, against the FLOPs left."""
    figure, (left, right) = _figure(11, 4, 1, 2)
    points = sorted(report.points, key=lambda p: p.report.flops)
    x = [p.report.flops / p.report.flops_dense for p in points]
    dense = points[0].report.quality_dense.figures[0]
    left.axhline(dense.value, color=COLORS["dense"], linestyle=":", label=f"dense, {dense.text}")
    qualities = [p.report.quality.figures[0].value for p in points]
    left.plot(x, qualities, "o-", color=COLORS["sparse"], label="pruned, one-shot")
    for at, y, point in zip(x, qualities, points, strict=True):
        left.annotate(f"{point.budget:g}", (at, y), textcoords="offset points", xytext=(0, -14), ha="center", fontsize=8)
    left.set(xlabel="FLOPs, fraction of dense", ylabel=_axis(dense), xlim=(0, 1.02))
    right.axhline(1, color=COLORS["dense"], linestyle=":", label=f"dense, {report.latency_ms_dense:.2f} ms")
    speed = [p.speedup for p in points]
    below, above = [s.value - s.low for s in speed], [s.high - s.value for s in speed]
    measured = f"measured, batch {report.batch_size}"
    right.errorbar(x, [s.value for s in speed], (below, above), fmt="o-", capsize=3, color=COLORS["sparse"], label=measured)
    predicted = [
        p.report.latency_ms_dense / p.report.latency_ms for p in points if p.report.latency_ms_dense and p.report.latency_ms
    ]
    if len(predicted) == len(x):
        right.plot(x, predicted, "s--", color=COLORS["masked-dense"], label="predicted from the device profile")
    right.set(xlabel="FLOPs, fraction of dense", ylabel="speed-up", xlim=(0, 1.02), ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False)
    return _svg(figure)


def recovery_picture(report: FinetuneReport, losses: list[float]) -> str:
    """Training loss by step, with its running mean, and validation accuracy by epoch; epoch 0 is the pruned model."""
    figure, (left, right) = _figure(11, 4, 1, 2)
    window = max(1, len(losses) // 50)
    means = [sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(losses))]
    steps = range(1, len(losses) + 1)
    left.plot(steps, losses, color=COLORS["sparse"], alpha=0.25, linewidth=0.8)
    left.plot(steps, means, color=COLORS["sparse"], linewidth=2, label=f"mean of {window} steps")
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    points = [report.quality_pruned.score[0], *(epoch.validation for epoch in report.history)]
    dense = report.quality_dense.score[0]
    right.axhline(dense, color=COLORS["dense"], linestyle=":", label=f"dense, {dense:.2f}")
    right.plot(range(len(points)), points, "o-", color=COLORS["sparse"], label="validation")
    best = f"best, {points[report.best_epoch]:.2f}"
    right.plot(report.best_epoch, points[report.best_epoch], "o", color=COLORS["masked-dense"], markersize=9, label=best)
    name = report.quality_dense.figures[0]
    right.set(xlabel="epoch (0: pruned)", ylabel=_axis(name) if name.percent else f"{name.name}, times 100")
    for axes in (left, right):
        axes.legend(frameon=False)
    return _svg(figure)


def gradual_picture(report: GradualReport) -> str:
    """Accuracy against the FLOPs left, step by step: down by pruning, up by recovery."""
    figure, axes = _figure(7, 4)
    fractions = [step.pruned.flops / step.pruned.flops_dense for step in report.steps]
    steps = report.steps
    pruned, recovered = ([getattr(step, name).quality.figures[0].value for step in steps] for name in ("pruned", "recovered"))
    dense = steps[0].pruned.quality_dense.figures[0]
    path = [
        (1.0, dense.value),
        *(point for x, a, b in zip(fractions, pruned, recovered, strict=True) for point in ((x, a), (x, b))),
    ]
    axes.axhline(dense.value, color=COLORS["dense"], linestyle=":", label=f"dense, {dense.text}")
    axes.plot(*zip(*path, strict=True), color=COLORS["dense"], linewidth=0.8)
    axes.plot(fractions, pruned, "o", color=COLORS["masked-dense"], label="pruned")
    axes.plot(fractions, recovered, "o-", color=COLORS["sparse"], linewidth=2, label="recovered")
    axes.set(xlabel="FLOPs, fraction of dense", ylabel=_axis(dense), xlim=(0, 1.02))
    axes.legend(frameon=False)
    return _svg(figure)


def merging_picture(batch: BatchBench, pruned: PruneReport) -> str:
    """One-shot quality against measured latency: dense, tokens only, weights only, both."""
    assert pruned.merged is not None
    qualities = {
        "dense": ("dense", pruned.quality_dense),
        "merged-dense": ("tokens only", pruned.merged.quality),
        "unmerged-sparse": ("weights only", pruned.merged.quality_unmerged),
        "sparse": ("both", pruned.quality),
    }
    figure, axes = _figure(7, 4)
    for name, (label, quality) in qualities.items():
        if name in batch.timing.subjects:
            x, value = batch.timing.subjects[name].median_ms, quality.figures[0].value
            axes.plot(x, value, "o", markersize=9, color=COLORS.get(name, OTHERS[len(label) % len(OTHERS)]))
            axes.annotate(label, (x, value), textcoords="offset points", xytext=(8, 4), fontsize=9)
    axes.set(xlabel=f"ms in a call, {batch.title}", ylabel=f"{_axis(pruned.quality.figures[0])}, one-shot")
    axes.margins(0.2)
    return _svg(figure)


def patches_picture(photos: Sequence[tuple[Any, Any]]) -> str:
    """Images beside what is left of them: patches that are one token in the colour of their mean. Arrays [H, W, 3] in 0..1."""
    figure, grid = _figure(2.4 * len(photos), 5, 2, len(photos), squeeze=False)
    for column, pair in zip(grid.T, photos, strict=True):
        for axes, image in zip(column, pair, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set_axis_off()
    return _svg(figure)


def _axis(figure: Figure) -> str:
    return f"{figure.name} (%)" if figure.percent else figure.name


def _figure(width: float, height: float, *grid: int, **options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    return pyplot.subplots(*grid, figsize=(width, height), layout="constrained", **options)


def _svg(figure: Any) -> str:
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
