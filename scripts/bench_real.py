"""One-shot pruning of a real pretrained DINOv2 ViT-S/14 by every method, on real photos without labels.

    python scripts/real_vit.py OUT
    python scripts/bench_real.py OUT --output benchmarks/results/real_dinov2.json

A method is one `lpvit prune --sweep 0.3,0.5,0.7`: nothing is trained. Cosine and relative error are those of the embeddings
of the validation photos to the dense model's; no picture is in both splits. Seconds and peak memory are of the whole command.
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

from results import publish

METHODS = {  # name in the table: what is set
    "obs (default)": [],
    "obs, layer by layer": ["prune.sequential=false"],
    "obs, neurons and heads": ["prune.patterns=[neurons, heads]", "prune.block=[64, 8]"],
    "fisher": ["prune.method=fisher"],
    "mfac": ["prune.method=mfac"],
    "lpvit": ["prune.method=lpvit"],
    "taylor": ["prune.method=taylor"],
    "wanda": ["prune.method=wanda"],
    "magnitude": ["prune.method=magnitude"],
}
SPARSITIES = (0.3, 0.5, 0.7)
IMAGES = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="what scripts/real_vit.py wrote")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    args = parser.parse_args()
    out = args.out.resolve()
    common = [f"model.weights={out / 'dinov2_vits14.safetensors'}", "model.pretrained=false", f"data.root={out / 'photos'}"]
    common += ["data.workers=0", f"calibrate.images={IMAGES}"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        calibrated = command(["calibrate"], Path(folder), common)
        calibrated.pop("report")
        print(f"calibrate on {IMAGES} photos: {calibrated['seconds']:.0f} s, {calibrated['peak_gib']:.2f} GiB", flush=True)
        for method in args.methods:
            rows += pruned(method, Path(folder), common)
    publish("bench_real", ("torch", "timm"), args.output, images=IMAGES, calibrate=calibrated, rows=rows)


def pruned(method: str, folder: Path, common: list[str]) -> list[dict[str, Any]]:
    """A row for each sparsity; where the method was refused, one that says why."""
    ran = command(["prune", "--sweep", ",".join(map(str, SPARSITIES))], folder, [*common, *METHODS[method]])
    report, cost = ran.pop("report"), f"{ran['seconds']:.0f} s for all, {ran['peak_gib']:.2f} GiB"
    if ran["error"]:
        print(f"{method}: {ran['error']} ({cost})", flush=True)
        return [{"method": method} | ran]
    print(f"{method}: {cost}", flush=True)
    rows = []
    for point in report["points"]:
        made, quality = point["report"], point["report"]["quality"]
        flops = made["flops"] / made["flops_dense"]
        rows.append({"method": method, "sparsity": point["budget"], "flops": flops} | quality | ran)
        print(
            f"    {point['budget']:.0%}  cosine {quality['cosine']:.3f} (worst 5 % {quality['cosine_p5']:.3f})  "
            f"error {quality['relative_error']:.3f}  FLOPs {flops:.2f}",
            flush=True,
        )
    return rows


def command(words: list[str], folder: Path, changes: list[str]) -> dict[str, Any]:
    """Run a command on dinov2_small_50 and take its seconds and the most memory it had."""
    sets = [word for change in changes for word in ("--set", change)]
    name, *options = words
    line = [sys.executable, "-m", "lpvit_cli", name, "dinov2_small_50", *options, "-o", str(folder / "run"), "--json", *sets]
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
