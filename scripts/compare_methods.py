"""Pruning methods side by side: same model, calibration images and number of weights; one-shot and after the same recovery.

    python scripts/compare_methods.py --output benchmarks/results/compare_methods.json

Two models: the demo's ViT, and a small Swin on wide images (digits at random places of 32x64 pixels) that is trained first.
Top-1 in %, mean over seeds (which choose the calibration images, drawn labels and recovery) with the range. M-FAC and block
Fisher take gradients of 128 of the images, with their labels. The picture is written beside the output; the last line of stdout
is the result as JSON.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from results import publish
from tasks import CPU, Task, plan_of, recover, swin_task, vit_task
from torch import Tensor, nn

from lpvit_cli.curvature import LayerStatistics, collect
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.pruning.allocate import Curve, allocate
from lpvit_cli.pruning.block_obs import compensated
from lpvit_cli.pruning.blocks import Block, block_elements
from lpvit_cli.pruning.engine import prune_model
from lpvit_cli.pruning.methods.obs import obs
from lpvit_cli.pruning.plan import Plan
from lpvit_cli.pruning.removal import Removal
from lpvit_cli.recipe.finetune import FinetuneSection
from lpvit_cli.recipe.prune import Budget, Layers
from lpvit_cli.sparse import sparsify
from lpvit_cli.tasks.classification import calibration_loss

SPARSITIES = (0.5, 0.7, 0.8, 0.9)
RECOVERED = ("magnitude, global", "wanda, uniform", "taylor", "lpvit", "block Fisher", "M-FAC", "obs")  # the rest: ablations


# methods: each gives removal orders, and weights for a mask


@dataclass
class Method:
    removals: dict[str, Removal]
    uniform: bool = False  # the same fraction of every layer, for scores that do not compare across layers
    weights: Callable[[str, Tensor], Tensor] | None = None  # layer, block mask -> compensated weight
    plan: Plan | None = None  # lpvit's own engine prunes; the rest is not used


def methods(task: Task, layers: dict[str, nn.Linear], seed: int, block: Block) -> dict[str, Callable[[], Method]]:
    calibration = task.calibration(seed)
    gathered = copy.deepcopy(task.model)
    found = prunable_layers(gathered, Layers())  # type: ignore[arg-type]
    statistics = collect(gathered, found, calibration, calibration_loss("sampled", seed), CPU, lambda done: None)

    def removals(name: str) -> dict[str, Removal]:
        plan = plan_of(task.model, statistics, calibration, "sampled", seed, block=block, method=name)
        return {layer: plan.method.removal(layer, block, balanced=False) for layer in layers}

    def least_squares(name: str, mask: Tensor) -> Tensor:
        return compensated(layers[name].weight.detach(), statistics[name].hessian, mask, block)

    def weighed(change: Callable[[Tensor], Tensor]) -> Method:
        """obs, S of each layer [out, out] changed."""
        other: dict[str, LayerStatistics] = copy.deepcopy(statistics)
        for layer in other.values():
            layer.G = change(layer.G)
        orders = {name: obs(module.weight.detach(), other[name], block) for name, module in layers.items()}
        return Method(orders, weights=least_squares)

    def engine(gradient: str = "sampled", **settings: object) -> Method:
        plan = plan_of(task.model, statistics, calibration, gradient, seed, **{"block": block, "beta": 0.0, **settings})
        return Method({}, plan=plan)

    return {
        "magnitude, uniform": lambda: Method(removals("magnitude"), uniform=True),
        "magnitude, global": lambda: Method(removals("magnitude")),
        "wanda, uniform": lambda: Method(removals("wanda"), uniform=True),
        "taylor": lambda: Method(removals("taylor")),
        "lpvit": lambda: Method(removals("lpvit")),
        "lpvit, refitted": lambda: Method(removals("lpvit"), weights=least_squares),
        "obs, uniform": lambda: Method(removals("obs"), uniform=True, weights=least_squares),
        "obs, no compensation": lambda: Method(removals("obs")),
        "obs, layer-mean S": lambda: weighed(lambda s: s.diagonal().mean() * torch.eye(len(s))),
        "obs, diagonal S": lambda: weighed(lambda s: s.diagonal().diag()),
        "obs, each layer alone": lambda: engine(reweigh=0, sequential=False),
        "obs, reweighed": lambda: engine(sequential=False),
        "obs, sequential": lambda: engine(reweigh=0),
        "obs": lambda: engine(),
        "block Fisher": lambda: engine("empirical", method="fisher"),  # of the given labels
        "M-FAC": lambda: engine("empirical", method="mfac"),
    }


def prune(task: Task, layers: dict[str, nn.Linear], method: Method, sparsity: float, block: Block) -> nn.Module:
    """The model with that fraction of its prunable weights removed; equal to FLOPs where all layers see the same tokens."""
    if method.plan:
        return prune_model(method.plan, Budget(sparsity=sparsity), lambda *_: None)[0]
    counts = {}
    if method.uniform:
        counts = {name: round(sparsity * len(removal.order)) for name, removal in method.removals.items()}
    else:
        curves = {}
        for name, removal in method.removals.items():
            elements = block_elements((layers[name].out_features, layers[name].in_features), block)
            kept, blocks = removal.along(elements), len(removal.order)
            curves[name] = Curve(removal.distortion, torch.zeros(blocks + 1, dtype=torch.float64), kept, most_removals=blocks)
        total = sum(layer.weight.numel() for layer in layers.values())
        choices = allocate({name: [curve] for name, curve in curves.items()}, (1 - sparsity) * total, beta=0.0)
        counts = {name: choice.removed for name, choice in choices.items()}
    model = copy.deepcopy(task.model)
    masks = {name: removal.mask(counts[name]) for name, removal in method.removals.items()}
    if method.weights:
        for name, mask in masks.items():
            model.get_submodule(name).weight.data = method.weights(name, mask)
    sparsify(model, masks, block)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="digits_vit,digits_swin")
    parser.add_argument("--block", type=int, nargs=2, default=(16, 16), metavar=("R", "C"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recovery-epochs", type=int, default=1, help="0: one-shot only")
    parser.add_argument("--methods", nargs="+", help="of those in the tables; all if not given")
    parser.add_argument("--cache", type=Path, default=Path("runs/compare"), help="where the trained Swin is kept")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    block = (args.block[0], args.block[1])

    started = time.monotonic()
    makers = {"digits_vit": vit_task, "digits_swin": lambda: swin_task(args.cache / "digits_swin.safetensors")}
    rows: list[dict[str, object]] = []
    for model_name in args.models.split(","):
        task = makers[model_name]()
        layers = prunable_layers(task.model, Layers())  # type: ignore[arg-type]
        dense = task.top1(task.model)
        print(f"{task.name}: dense top-1 {dense:.2f} %, blocks {block[0]}x{block[1]}", flush=True)
        results: dict[tuple[str, float], list[tuple[float, float | None]]] = {}
        for seed in range(args.seeds):
            for name, make in methods(task, layers, seed, block).items():
                if args.methods and name not in args.methods:
                    continue
                method = make()
                for sparsity in SPARSITIES:
                    model = prune(task, layers, method, sparsity, block)
                    before, after = task.top1(model), None
                    if args.recovery_epochs and name in RECOVERED:
                        recover(task, model, seed, FinetuneSection(epochs=args.recovery_epochs, rank=8, warmup_epochs=0.2))
                        after = task.top1(model)
                    results.setdefault((name, sparsity), []).append((before, after))
                print(f"  seed {seed}, {name}: {time.monotonic() - started:.0f} s", flush=True)
        for (name, sparsity), found in results.items():
            row = {"model": task.name, "dense": dense, "method": name, "sparsity": sparsity}
            row["one_shot"] = [round(before, 2) for before, _ in found]
            row["recovered"] = [round(after, 2) for _, after in found if after is not None]
            rows.append(row)
        print_table(rows, task.name, "one_shot")
        if args.recovery_epochs:
            print_table(rows, task.name, "recovered")
    publish(
        "compare_methods",
        ("torch", "timm"),
        args.output,
        block=list(block),
        seeds=args.seeds,
        recovery_epochs=args.recovery_epochs,
        minutes=round((time.monotonic() - started) / 60, 1),
        rows=rows,
    )
    if args.output:
        draw(rows, args.output.with_suffix(".svg"))


def print_table(rows: list[dict[str, object]], model: str, what: str) -> None:
    print(f"\n{model}, {what.replace('_', '-')}: top-1 in %, mean (lowest to highest seed)")
    print(f"{'method':<22}" + "".join(f"{f'{s:.0%} removed':>24}" for s in SPARSITIES))
    for name in dict.fromkeys(row["method"] for row in rows if row["model"] == model and row[what]):
        cells = [row[what] for row in rows if row["model"] == model and row["method"] == name]
        texts = [f"{sum(c) / len(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in cells]  # type: ignore[arg-type, type-var]
        print(f"{name!s:<22}" + "".join(f"{text:>24}" for text in texts))
    print(flush=True)


def draw(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, grid = pyplot.subplots(1, len(models), figsize=(6.5 * len(models), 4.5), layout="constrained", squeeze=False)
    for axes, model in zip(grid[0], models, strict=True):
        for name in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["model"] == model and row["method"] == name]
            if mine:
                x = [100 * row["sparsity"] for row in mine]  # type: ignore[operator]
                low, mean, high = ([f(row["one_shot"]) for row in mine] for f in (min, lambda c: sum(c) / len(c), max))
                (line,) = axes.plot(x, mean, "o-", label=name, linewidth=2.5 if name == "obs" else 1.2)
                axes.fill_between(x, low, high, alpha=0.15, color=line.get_color())
        axes.set(xlabel="prunable weights removed (%)", ylabel="one-shot top-1 (%)", title=str(model))
    grid[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
