"""Do the layer curves tell the truth? Every layer pruned alone, predicted distortion against measured divergence.

    python scripts/predicted_errors.py --output benchmarks/results/predicted_errors.json

obs predicts in units of the loss, 1/2 d^T F d; with labels drawn from the model that is the Kullback-Leibler divergence of the
pruned model from the dense one, in nats an image, to second order. Measured on the calibration images and on the validation
images. The last line of stdout is the result as JSON.
"""

import argparse
import copy
from pathlib import Path

import torch
from results import publish
from tasks import CPU, Task, swin_task, vit_task
from torch import Tensor

from lpvit_cli.curvature import collect
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.pruning.block_obs import compensated
from lpvit_cli.pruning.methods.obs import obs
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.tasks.classification import Classification

REMOVED = (0.25, 0.5, 0.7, 0.8, 0.9)
BLOCK = (16, 16)
TASK = Classification()


def points(task: Task, seed: int = 0) -> list[dict[str, object]]:
    model = copy.deepcopy(task.model)
    layers = prunable_layers(model, Layers())
    calibration = task.calibration(seed)
    statistics = collect(model, layers, calibration, TASK.loss("sampled", seed), CPU, lambda done: None)
    images = {"calibration": calibration, "validation": task.val}
    dense = {which: TASK.outputs(model, batches, CPU) for which, batches in images.items()}
    rows = []
    for name, layer in layers.items():
        weight, hessian = layer.weight.detach().clone(), statistics[name].hessian
        removal = obs(weight, statistics[name], BLOCK)
        for fraction in REMOVED:
            removed = round(fraction * removal.steps)
            layer.weight.data = compensated(weight, hessian, removal.mask(removed), BLOCK)
            row = {"layer": name, "removed": fraction, "predicted": float(removal.distortion[removed])}
            rows.append(
                row
                | {which: TASK.divergence(TASK.outputs(model, batches, CPU), dense[which]) for which, batches in images.items()}
            )
        layer.weight.data = weight
    return rows


def correlations(rows: list[dict[str, object]], measured: str) -> dict[str, float]:
    """Pearson's of the logarithms, Spearman's of the ranks, and the median of measured / predicted."""
    pairs = torch.tensor([(row["predicted"], row[measured]) for row in rows], dtype=torch.float64).clamp_min(1e-12).T

    def pearson(xy: Tensor) -> float:
        return float(torch.corrcoef(xy)[0, 1])

    return {
        "pearson_log": pearson(pairs.log()),
        "spearman": pearson(pairs.argsort(dim=1).argsort(dim=1).double()),
        "median_ratio": float((pairs[1] / pairs[0]).median()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("runs/compare"), help="where the trained Swin is kept")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    models = []
    for task in (vit_task(), swin_task(args.cache / "digits_swin.safetensors")):
        rows = points(task)
        found = {which: correlations(rows, which) for which in ("calibration", "validation")}
        for which, one in found.items():
            print(f"{task.name}, {which}: " + ", ".join(f"{key} {value:.3f}" for key, value in one.items()), flush=True)
        models.append({"model": task.name, "correlations": found, "points": rows})
    publish("predicted_errors", ("torch", "timm"), args.output, block=list(BLOCK), models=models)


if __name__ == "__main__":
    main()
