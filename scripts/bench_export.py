"""Exported ONNX files of pruned vision transformers against the dense file, both in onnxruntime on this machine's CPU.

    python scripts/bench_export.py --output benchmarks/results/export_cpu.json

Weights are random, and so are the blocks kept: neither changes how long a file takes. In every row dense and sparse files
take turns, one session alive at a time; `auto` is the mix of forms that `lpvit export` would choose. The picture beside
--output shows speed by sparsity for each form and block. The last line of stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import timm
import torch
from lpvit_kernels import BlockSparseMatrix
from results import publish

from lpvit_cli.export.choose import choose_forms
from lpvit_cli.export.forms import FORMS, forms_of
from lpvit_cli.export.graph import dense_graph, save_onnx
from lpvit_cli.export.layer import ExportLayer
from lpvit_cli.export.rewrite import rewrite
from lpvit_cli.machine import cpu_name, installed
from lpvit_cli.measure.timing import Subject, TimingRun, time_in_visits
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.sparse import layer_tokens
from lpvit_cli.targets.onnxruntime import session

MODELS = {"DeiT-B": "deit_base_patch16_224", "DeiT-S": "deit_small_patch16_224"}
VISITS, SAMPLES = 3, 4
Block = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """What one interleaved run compares. `forms` of which precision: "rows", "auto int8", ..."""

    model: str
    block: Block
    sparsity: float
    threads: int
    batch: int
    files: tuple[str, ...]


ASKED = ("dense int8", "auto", "auto int8")  # beside dense
SHOWN = ("rows", "batched", "chain")


def cases() -> Iterator[Case]:
    """The numbers the project aims at, and then what the picture shows."""
    for threads, batch, sparsity in ((1, 1, 0.7), (2, 1, 0.7), (1, 8, 0.7), (2, 8, 0.7), (1, 1, 0.5), (2, 1, 0.5)):
        yield Case("DeiT-B", (128, 64), sparsity, threads, batch, ASKED)
    for block in ((128, 32), (64, 64)):
        yield Case("DeiT-B", block, 0.7, 1, 1, ASKED)
    for threads in (1, 2):
        yield Case("DeiT-S", (128, 64), 0.7, threads, 1, ASKED)
    for block in ((128, 64), (128, 32), (64, 64), (32, 32)):
        for sparsity in (0.3, 0.5, 0.7, 0.8, 0.9):
            yield Case("DeiT-S", block, sparsity, 1, 1, SHOWN)


class Bench:
    def __init__(self, folder: Path):
        self.folder = folder
        self.models: dict[str, VisionModel] = {}

    def rows(self, case: Case) -> list[dict[str, Any]]:
        layers = self._layers(case)
        paths = {"dense": self._dense(case.model)}
        chosen: dict[str, dict[str, int]] = {}
        for name in case.files:
            form, _, precision = name.partition(" ")
            written = {key: replace(layer, int8=precision == "int8") for key, layer in layers.items()}
            forms = self._forms(case, form, written)
            chosen[name] = {kind: list(forms.values()).count(kind) for kind in FORMS if kind in forms.values()}
            paths[name] = self.folder / f"{name.replace(' ', '_')}.onnx"
            graph = ir.load(paths["dense"])
            rewrite(graph, written, forms)
            save_onnx(graph, paths[name], {})
        timing = _time(case, paths)
        about = {"model": case.model, "block": "x".join(map(str, case.block)), "sparsity": case.sparsity}
        about |= {"threads": case.threads, "batch": case.batch, "foreign_load": timing.foreign_load}
        made = []
        for name, path in paths.items():
            ratio = timing.ratio("dense", name)
            made.append(
                about
                | {"file": name, "forms": chosen.get(name), "ms": timing.subjects[name].median_ms}
                | {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
                | {"bytes": path.stat().st_size, "size": path.stat().st_size / paths["dense"].stat().st_size}
            )
        return made

    def _layers(self, case: Case) -> dict[str, ExportLayer]:
        """The model's layers with random blocks kept."""
        generator = torch.Generator().manual_seed(0)
        layers = {}
        for name, linear in prunable_layers(self._model(case.model), Layers()).items():
            grid = [-(-size // side) for size, side in zip(linear.weight.shape, case.block, strict=True)]
            mask = torch.rand(grid, generator=generator) >= case.sparsity
            layers[name] = ExportLayer(
                name, BlockSparseMatrix.from_dense(linear.weight.detach(), case.block, mask), linear.bias.detach()
            )
        return layers

    def _forms(self, case: Case, form: str, layers: dict[str, ExportLayer]) -> dict[str, str]:
        if form != "auto":
            return {name: form if form in forms_of(layer) else "dense" for name, layer in layers.items()}
        model = self._model(case.model)
        tokens = {name: case.batch * count for name, count in layer_tokens(model, layers).items()}
        choices = choose_forms(layers, tokens, case.threads, lambda *_: None)
        return {name: choice.form for name, choice in choices.items()}

    def _model(self, name: str) -> VisionModel:
        if name not in self.models:
            torch.manual_seed(0)
            self.models = {name: timm.create_model(MODELS[name]).eval()}  # one at a time
        return self.models[name]

    def _dense(self, name: str) -> Path:
        path = self.folder / f"{name}.onnx"
        if not path.exists():
            save_onnx(dense_graph(self._model(name), 20), path, {})
        return path


def _time(case: Case, paths: dict[str, Path]) -> TimingRun:
    x = np.random.default_rng(0).standard_normal((case.batch, 3, 224, 224), dtype=np.float32)

    def open_file(path: Path) -> Subject:
        return partial(session(path, case.threads).run, None, {"images": x})

    opened = {name: partial(open_file, path) for name, path in paths.items()}
    return time_in_visits(opened, visits=VISITS, samples=SAMPLES, threads=case.threads)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed by sparsity, a panel for each form."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SHOWN), figsize=(4 * len(SHOWN), 3.6), sharey=True, layout="constrained")
    for form, axes in zip(SHOWN, panels, strict=True):
        shown = [row for row in rows if row["file"] == form]
        sparsities = sorted({row["sparsity"] for row in shown})
        axes.axhline(1, color="#6b7280", linewidth=1)
        axes.plot([100 * s for s in sparsities], [1 / (1 - s) for s in sparsities], ":", color="#6b7280", label="1/(1-s)")
        for block in dict.fromkeys(row["block"] for row in shown):
            line = sorted((100 * row["sparsity"], row["ratio"]) for row in shown if row["block"] == block)
            axes.plot(*zip(*line, strict=True), "o-", label=block)
        axes.set(title=form, xlabel="blocks removed (%)", ylim=(0.3, 4.5))
    panels[0].set_ylabel("times faster than the dense file")
    panels[0].legend(frameon=False, fontsize=8, title="block, out x in")
    versions = f"onnxruntime {installed('onnxruntime')}, {cpu_name()}, 1 thread, batch 1, float32"
    figure.suptitle(f"{shown[0]['model']} as one ONNX file: {versions}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="no further case is begun after them")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    began, rows, left_out = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        print("model      block  gone threads batch file              ms  ratio (95 %)         size  forms")
        for case in cases():
            if time.monotonic() - began > 60 * arguments.minutes:
                left_out += 1
                continue
            for row in bench.rows(case):
                rows.append(row)
                interval = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
                forms = " ".join(f"{count} {form}" for form, count in (row["forms"] or {}).items())
                print(
                    f"{row['model']:8}{row['block']:>8}{row['sparsity']:>6.0%}{row['threads']:>8}{row['batch']:>6} "
                    f"{row['file']:12}{row['ms']:8.1f}  {interval:20} {row['size']:.3f}  {forms}",
                    flush=True,
                )
    if arguments.output and any(row["file"] in SHOWN for row in rows):
        draw(rows, arguments.output.with_suffix(".svg"))
    packages = ("lpvit", "torch", "onnx", "onnxruntime")
    publish("bench_export", packages, arguments.output, device=cpu_name(), rows=rows, cases_left_out=left_out)


if __name__ == "__main__":
    main()
