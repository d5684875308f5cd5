"""One-shot pruning of a real pretrained DINOv2 ViT-S/14 by every method, on real photos without labels.

    python scripts/real_vit.py OUT
    python scripts/bench_real.py OUT --output benchmarks/results/real_dinov2.json

Each row is one `lpvit prune`: nothing is trained. Cosine and relative error are those of the embeddings of the validation
photos to the dense model's; no picture is in both splits. Seconds and peak memory are of the whole command, evaluation too.
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
    with tempfile.TemporaryDirectory() as folder:
        calibrated = command("calibrate", Path(folder), common)
        calibrated.pop("report")
        print(f"calibrate on {IMAGES} photos: {calibrated['seconds']:.0f} s, {calibrated['peak_gib']:.2f} GiB", flush=True)
        rows = []
        for method in args.methods:
            for sparsity in SPARSITIES:
                changes = [*METHODS[method], f"prune.budget.sparsity={sparsity}"]
                rows.append({"method": method, "sparsity": sparsity} | pruned(Path(folder), [*common, *changes]))
                print(told(rows[-1]), flush=True)
    publish("bench_real", ("torch", "timm"), args.output, images=IMAGES, calibrate=calibrated, rows=rows)


def pruned(folder: Path, changes: list[str]) -> dict[str, Any]:
    """Cosine, relative error, FLOPs and what the command took; why, where it was refused."""
    ran = command("prune", folder, changes)
    report = ran.pop("report")
    if ran["error"]:
        return ran
    quality = {key: report["quality"][key] for key in ("images", "cosine", "cosine_p5", "relative_error")}
    return quality | {"flops": report["flops"] / report["flops_dense"]} | ran


def command(name: str, folder: Path, changes: list[str]) -> dict[str, Any]:
    """Run `lpvit NAME dinov2_small_50` and take its time and the most memory it had."""
    sets = [word for change in changes for word in ("--set", change)]
    words = [sys.executable, "-m", "lpvit_cli", name, "dinov2_small_50", "--output", str(folder / "run"), "--json", *sets]
    started = time.monotonic()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(words, stdout=printed, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        printed.seek(0)
        content = json.loads(printed.read())
    error = content["error"]["message"] if os.waitstatus_to_exitcode(status) else None
    return {"seconds": seconds, "peak_gib": usage.ru_maxrss / 2**20, "error": error, "report": content}


def told(row: dict[str, Any]) -> str:
    what = f"{row['method']:24} {row['sparsity']:.0%}  "
    if row["error"]:
        return f"{what}{row['error']}"
    return (
        f"{what}cosine {row['cosine']:.3f} (worst 5 % {row['cosine_p5']:.3f})  error {row['relative_error']:.3f}  "
        f"FLOPs {row['flops']:.2f}  {row['seconds']:.0f} s  {row['peak_gib']:.2f} GiB"
    )


if __name__ == "__main__":
    main()
