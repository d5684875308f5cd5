"""One-shot pruning of a real pretrained DINOv2 ViT-S/14 by every method, on real photos without labels.

    python scripts/real_vit.py OUT
    python scripts/bench_real.py OUT --output benchmarks/results/real_dinov2.json
    python scripts/bench_real.py OUT --output benchmarks/results/real_dinov2.json --methods   # draws the picture anew

A row is one point of `lpvit prune --sweep`: nothing is trained. Cosine and relative error are those of the embeddings to the
dense model's, on photos of pictures that calibration has not seen; `cosine_crops` on other crops of the pictures that it has
seen. Seconds and peak memory are of the whole command. Rows of methods that are not run again stay in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import publish
from torch import nn
from torch.nn import functional as F

from lpvit_cli import Recipe, load_model
from lpvit_cli.data.splits import held_back_batches
from lpvit_cli.models.build import build_model
from lpvit_cli.tasks.base import outputs_of

RECIPE, IMAGES, CPU = "dinov2_small_50", 256, torch.device("cpu")
GIVEN = "prune.reorder=false"  # rivals, as their papers have them
UNITS = "prune.patterns=[neurons, heads]"
METHODS: dict[str, tuple[dict[str, tuple[float, ...]], list[str]]] = {  # name in the table: budgets, and what is set
    "obs, 64x32": ({"sparsity": (0.3, 0.5, 0.7)}, ["prune.block=[64, 32]"]),
    "obs, 128x64": ({"sparsity": (0.3, 0.5, 0.7)}, []),
    "obs, 128x128": ({"sparsity": (0.5,)}, ["prune.block=[128, 128]"]),
    "obs, 384x64": ({"sparsity": (0.5,)}, ["prune.block=[384, 64]"]),
    "obs, neurons and heads": ({"flops": (0.81, 0.72, 0.61)}, [UNITS, "prune.neuron_group=8"]),
    "obs, neurons, heads and blocks of 64x32": (
        {"flops": (0.81, 0.72, 0.61, 0.5)},
        ["prune.patterns=[blocks, neurons, heads]", "prune.neuron_group=8", "prune.block=[64, 32]"],
    ),
    "obs, 128x64, given order": ({"sparsity": (0.5,)}, [GIVEN]),
    "obs, 128x64, layer by layer": ({"sparsity": (0.5,)}, ["prune.sequential=false"]),
    **{
        f"{method}, 128x64": ({"sparsity": (0.3, 0.5, 0.7)}, [f"prune.method={method}", GIVEN])
        for method in ("fisher", "mfac", "lpvit", "taylor", "wanda", "magnitude")
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="what scripts/real_vit.py wrote")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    args = parser.parse_args()
    out = args.out.resolve()
    common = [f"model.weights={out / 'dinov2_vits14.safetensors'}", "model.pretrained=false", f"data.root={out / 'photos'}"]
    common += ["data.workers=0", f"calibrate.images={IMAGES}", "target.batch_size=1", "bench.rounds=6"]
    written = json.loads(args.output.read_text())["rows"] if args.output and args.output.exists() else []
    known = [row for row in written if row["method"] in METHODS]
    if args.methods:
        measure(args, common, known)
    if args.output:
        draw(json.loads(args.output.read_text())["rows"], args.output.with_suffix(".svg"))


def measure(args: argparse.Namespace, common: list[str], known: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        calibrated = command(["calibrate"], Path(folder), common)
        calibrated.pop("report")
        print(f"calibrate on {IMAGES} photos: {calibrated['seconds']:.0f} s, {calibrated['peak_gib']:.2f} GiB", flush=True)
        for method in args.methods:
            rows = pruned(method, Path(folder), common)
            known = [row for row in known if row["method"] != method] + rows
            ordered = sorted(known, key=lambda row: list(METHODS).index(row["method"]))
            publish("bench_real", ("torch", "timm"), args.output, images=IMAGES, calibrate=calibrated, rows=ordered)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Cosine by the FLOPs left: on other pictures, and on other crops of the calibration pictures."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    methods = dict.fromkeys(row["method"] for row in rows if row.get("cosine") is not None)
    for axes, key, title in zip(panels, ("cosine", "cosine_crops"), ("other pictures", "other crops"), strict=True):
        for method in methods:
            points = sorted((row["flops"], row[key]) for row in rows if row["method"] == method)
            axes.plot(*zip(*points, strict=True), "o-" if method.startswith("obs") else "s:", label=method)
        axes.set(title=f"on {title}", xlabel="FLOPs, fraction of dense", ylim=(0, 1.02))
    panels[0].set_ylabel("cosine to the dense model, one-shot")
    panels[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def pruned(method: str, folder: Path, common: list[str]) -> list[dict[str, Any]]:
    """A row for each budget; where the method was refused, one that says why."""
    (budget,), sets = METHODS[method]
    values = METHODS[method][0][budget]
    sets = [*common, *sets, f"prune.budget={{{budget}: {values[0]}}}"]
    ran = command(["prune", "--sweep", ",".join(map(str, values))], folder, sets)
    report, cost = ran.pop("report"), f"{ran['seconds']:.0f} s for all, {ran['peak_gib']:.2f} GiB"
    if ran["error"]:
        print(f"{method}: {ran['error']} ({cost})", flush=True)
        return [{"method": method} | ran]
    print(f"{method}: {cost}", flush=True)
    rows = []
    for point in report["points"]:
        made, quality = point["report"], point["report"]["quality"]
        flops = made["flops"] / made["flops_dense"]
        crops = cosine_of_crops(folder / "run" / "sweep" / point["folder"], sets)
        row = {"method": method, budget: point["budget"], "flops": flops, "cosine_crops": crops} | quality | ran
        rows.append(row | {"budgets": len(values)})
        print(
            f"    {budget} {point['budget']:.0%}  cosine {quality['cosine']:.3f} (worst 5 % {quality['cosine_p5']:.3f}, "
            f"other crops {crops:.3f})  error {quality['relative_error']:.3f}  FLOPs {flops:.2f}",
            flush=True,
        )
    return rows


def cosine_of_crops(folder: Path, sets: list[str]) -> float:
    """The mean cosine to the dense model on training images that calibration has not seen."""
    recipe = Recipe.load(RECIPE, sets)
    dense = build_model(recipe.model, recipe.task, recipe.features)
    images = held_back_batches(recipe.data, recipe.calibrate, recipe.seed, dense)
    assert images is not None
    models: list[nn.Module] = [load_model(folder), dense]
    ours, theirs = (outputs_of(model, images, CPU, torch.bfloat16) for model in models)
    return float(F.cosine_similarity(ours, theirs).mean())


def command(words: list[str], folder: Path, changes: list[str]) -> dict[str, Any]:
    """Run a command on the recipe and take its seconds and the most memory it had."""
    sets = [word for change in changes for word in ("--set", change)]
    name, *options = words
    line = [sys.executable, "-m", "lpvit_cli", name, RECIPE, *options, "-o", str(folder / "run"), "--json", *sets]
    started = time.monotonic()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(line, stdout=printed, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        printed.seek(0)
        content = json.loads(printed.read())
    error = content["error"]["message"] if os.waitstatus_to_exitcode(status) else None
    return {"seconds": seconds, "peak_gib": usage.ru_maxrss / 2**20, "error": error, "report": content}


if __name__ == "__main__":
    main()
