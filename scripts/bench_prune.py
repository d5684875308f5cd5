"""What calibration and the whole obs engine cost: minutes and peak memory. Weights and images are random: they cost the same.

    python scripts/bench_prune.py --output benchmarks/results/prune_cpu.json      # about an hour on two cores

Each case runs in a process of its own, so that peaks do not mix. The last line of stdout is the result as JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from results import publish

CASES = (  # model, images, block
    ("deit_small_patch16_224", 64, (128, 32)),
    ("deit_small_patch16_224", 256, (128, 32)),
    ("deit_small_patch16_224", 256, (16, 16)),
    ("deit_base_patch16_224", 256, (128, 32)),
    ("deit_base_patch16_224", 256, (16, 16)),
)
BATCH = 32
BUDGET = 0.5  # of the prunable weights are removed


def measure(model_name: str, images: int, block: tuple[int, int]) -> dict[str, object]:
    import torch

    from lpvit_cli.curvature import collect
    from lpvit_cli.models.build import build_model
    from lpvit_cli.models.layers import prunable_layers
    from lpvit_cli.pruning.engine import prune_model
    from lpvit_cli.pruning.plan import build_plan
    from lpvit_cli.recipe.model import ModelSection
    from lpvit_cli.recipe.prune import Budget, PruneSection
    from lpvit_cli.tasks.classification import Classification

    row: dict[str, object] = {"model": model_name, "images": images, "block": list(block)}

    def finished(step: str) -> None:
        nonlocal start, cpu_start
        row[f"{step}_minutes"] = round((time.monotonic() - start) / 60, 2)
        row[f"{step}_cpu_minutes"] = round((time.process_time() - cpu_start) / 60, 2)  # of all threads
        row[f"{step}_peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        start, cpu_start = time.monotonic(), time.process_time()

    settings, task, device = PruneSection(block=block), Classification(), torch.device("cpu")
    torch.manual_seed(0)
    start, cpu_start = time.monotonic(), time.process_time()
    model = build_model(ModelSection(name=model_name))
    layers = prunable_layers(model, settings.layers)
    batches = [(torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,))) for _ in range(images // BATCH)]
    finished("model_and_images")
    statistics = collect(model, layers, batches, task.loss("empirical", 0), device, lambda done: None)
    finished("calibrate")
    facts = {"task": task, "gradient": "empirical", "seed": 0, "device": device, "progress": lambda *_: None}
    plan = build_plan(settings, model, layers, statistics, batches, example=batches[0][0][:1], **facts)
    finished("curves")
    _, pruned = prune_model(plan, Budget(sparsity=BUDGET), lambda *_: None)
    finished("prune")
    assert abs(plan.predict(pruned).kept_fraction - (1 - BUDGET)) < 0.01
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", type=int, help="measure one case in this process")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(*CASES[args.case])))
        return

    rows = []
    for case in range(len(CASES)):
        done = subprocess.run([sys.executable, __file__, "--case", str(case)], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    publish("bench_prune", ("torch", "timm"), args.output, sparsity=BUDGET, rows=rows)


if __name__ == "__main__":
    main()
