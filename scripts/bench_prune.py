"""What calibration and block OBS cost: minutes and peak memory, with random weights and images (they do not change the cost).

    python scripts/bench_prune.py --output benchmarks/results/prune_cpu.json      # about half an hour on two cores

Each model is measured in a process of its own, so that peaks do not mix. The last line of stdout is the result as JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

CASES = (  # model, images
    ("deit_small_patch16_224", 64),
    ("deit_small_patch16_224", 256),
    ("deit_base_patch16_224", 256),
)
BLOCKS = ((128, 32), (16, 16))


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(model_name: str, images: int) -> dict[str, object]:
    import torch

    from lpvit_cli.curvature import collect
    from lpvit_cli.models import build_model, prunable_layers
    from lpvit_cli.pruning.saliency import obs
    from lpvit_cli.pruning.surgeon import compensated
    from lpvit_cli.recipe import Layers, ModelSection

    torch.manual_seed(0)
    model = build_model(ModelSection(name=model_name))
    layers = prunable_layers(model, Layers())
    with_model = peak_gib()
    batches = ((torch.randn(8, 3, 224, 224), torch.randint(1000, (8,))) for _ in range(images // 8))
    start = time.monotonic()
    statistics = collect(model, layers, batches, "empirical", 0, torch.device("cpu"), lambda done: None)
    row: dict[str, object] = {
        "model": model_name,
        "images": images,
        "layers": len(layers),
        "calibrate_minutes": round((time.monotonic() - start) / 60, 2),
        "calibrate_peak_gib": round(peak_gib(), 2),
        "model_gib": round(with_model, 2),
    }
    for block in BLOCKS:
        start = time.monotonic()
        for name, layer in layers.items():
            removal = obs(layer.weight.detach(), statistics[name], block)
            compensated(layer.weight.detach(), statistics[name].hessian, removal.mask(len(removal.order) // 2), block)
        row[f"obs_{block[0]}x{block[1]}_minutes"] = round((time.monotonic() - start) / 60, 2)
        row[f"obs_{block[0]}x{block[1]}_peak_gib"] = round(peak_gib(), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", nargs=2, metavar=("MODEL", "IMAGES"), help="measure one case in this process")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case[0], int(args.case[1]))))
        return
    from lpvit_cli.measure.machine import provenance

    rows = []
    for model, images in CASES:
        command = [sys.executable, __file__, "--case", model, str(images)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    result = {
        "benchmark": "bench_prune",
        **provenance("torch", "timm"),
        "rows": rows,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
