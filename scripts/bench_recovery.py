"""Recovery compared: LoRA-GA, plain LoRA and training all kept blocks, on the same pruned models with the same images.

    python scripts/bench_recovery.py curves --output benchmarks/results/recovery_curves.json
    python scripts/bench_recovery.py cost --output benchmarks/results/recovery_cost.json

`curves`: the demo's ViT and a small Swin, pruned by obs in blocks of 16x16, recovered for 6 epochs by each method at the
learning rate that suits it: of RATES the one with the lowest training loss in the last epoch at the highest sparsity, on a seed
used for nothing else.
`cost`: DeiT-B at rank 16: parameters, optimizer memory and peak memory of a step, each measured in a process of its own, and
the product on kept blocks against the dense one, in turns. The last line of stdout is the result as JSON.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median

import torch
from results import publish
from tasks import CPU, Task, plan_of, recover, swin_task, vit_task
from torch import nn
from torch.nn import functional as F

from lpvit_cli.curvature import collect
from lpvit_cli.measure.statistics import paired_ratio
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.pruning.engine import prune_model
from lpvit_cli.recipe.finetune import FinetuneSection
from lpvit_cli.recipe.prune import Budget, Layers
from lpvit_cli.recovery.lora import adapt, kept_gradients, lora_ga_factors
from lpvit_cli.recovery.start import choose_trained
from lpvit_cli.recovery.trainer import optimizer_of
from lpvit_cli.sparse import sparse_layers, sparsify
from lpvit_cli.tasks.classification import calibration_loss

METHODS = ("lora_ga", "lora", "full")
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
EPOCHS, RANK, BLOCK = 6, 8, (16, 16)
TUNING_SEED = 100
COLORS = {"lora_ga": "#2563eb", "lora": "#d97706", "full": "#6b7280"}


# curves


def pruned(task: Task, sparsity: float, seed: int) -> nn.Module:
    calibration = task.calibration(seed)
    gathered = copy.deepcopy(task.model)
    statistics = collect(
        gathered, prunable_layers(gathered, Layers()), calibration, calibration_loss("sampled", seed), CPU, lambda done: None
    )  # type: ignore[arg-type]
    plan = plan_of(task.model, statistics, calibration, "sampled", seed, block=BLOCK)
    return prune_model(plan, Budget(sparsity=sparsity), lambda *_: None)[0]


def settings(method: str, rate: float) -> FinetuneSection:
    return FinetuneSection(method=method, epochs=EPOCHS, rank=RANK, lr=rate, warmup_epochs=0.5)  # type: ignore[arg-type]


def smoothed(losses: list[float], steps: int) -> list[float]:
    """Mean of the latest `steps` losses, an epoch: single batches differ more than methods do."""
    return [mean(losses[max(0, at + 1 - steps) : at + 1]) for at in range(len(losses))]


def curves(args: argparse.Namespace) -> None:
    started = time.monotonic()
    makers = {"digits_vit": vit_task, "digits_swin": lambda: swin_task(args.cache / "digits_swin.safetensors")}
    rows, drawn, tuned = [], {}, {}
    for name in args.models.split(","):
        task = makers[name]()
        steps = -(-len(task.train[0]) // 64)
        base, rates = pruned(task, args.sparsities[-1], TUNING_SEED), dict.fromkeys(METHODS, args.rate)
        for method in METHODS if args.rate is None else ():
            tried = {}
            for rate in RATES:
                losses, top1 = recover(task, copy.deepcopy(base), TUNING_SEED, settings(method, rate))
                tried[rate] = mean(losses[-steps:])
                print(f"{method} lr {rate:.0e}: loss {tried[rate]:.4f}, top-1 {top1[-1]:.2f} %", flush=True)
            rates[method] = min(tried, key=tried.__getitem__)
            tuned[f"{name}, {method}"] = {f"{rate:.0e}": loss for rate, loss in tried.items()}
        for sparsity in args.sparsities:
            found: dict[str, list[dict[str, object]]] = {method: [] for method in METHODS}
            one_shot = []
            for seed in range(args.seeds):
                model = pruned(task, sparsity, seed)
                one_shot.append(task.top1(model))
                for method in METHODS:
                    losses, top1 = recover(task, copy.deepcopy(model), seed, settings(method, rates[method]))
                    found[method].append({"losses": smoothed(losses, steps), "top1": top1})
            for method in METHODS:
                target = [run["losses"][-1] for run in found["lora"]]  # type: ignore[index]
                reached = [
                    next((at + 1 for at, loss in enumerate(run["losses"]) if at + 1 >= steps and loss <= goal), None)  # type: ignore[arg-type, index]
                    for run, goal in zip(found[method], target, strict=True)
                ]
                row = {
                    "model": task.name,
                    "sparsity": sparsity,
                    "method": method,
                    "lr": rates[method],
                    "steps": EPOCHS * steps,
                    "one_shot": one_shot,
                    "last_top1": [run["top1"][-1] for run in found[method]],  # type: ignore[index]
                    "best_top1": [max(run["top1"]) for run in found[method]],  # type: ignore[type-var]
                    "final_loss": [run["losses"][-1] for run in found[method]],  # type: ignore[index]
                    "steps_to_loras_final_loss": reached,
                }
                rows.append(row)
                print(describe(row), flush=True)
                drawn[(task.name, sparsity, method)] = [run["losses"] for run in found[method]]
            print(f"  {time.monotonic() - started:.0f} s", flush=True)
    if args.output:
        draw(drawn, args.sparsities, args.output.with_suffix(".svg"))
    publish(
        "recovery_curves",
        ("torch", "timm"),
        args.output,
        block=list(BLOCK),
        rank=RANK,
        epochs=EPOCHS,
        seeds=args.seeds,
        minutes=round((time.monotonic() - started) / 60, 1),
        tuning=tuned,
        rows=rows,
    )


def describe(row: dict[str, object]) -> str:
    top1, loss = (mean(row[key]) for key in ("last_top1", "final_loss"))  # type: ignore[arg-type]
    reached = " ".join("never" if at is None else str(at) for at in row["steps_to_loras_final_loss"])  # type: ignore[attr-defined]
    where = f"{row['model']}, {row['sparsity']:.0%}, {row['method']:<7} lr {row['lr']:.0e}"
    return f"{where}: loss {loss:.4f}, top-1 {top1:.2f} %, LoRA's final loss after {reached} of {row['steps']} steps"


def draw(drawn: dict[tuple[str, float, str], object], sparsities: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(key[0] for key in drawn))
    figure, grid = pyplot.subplots(
        len(models), len(sparsities), figsize=(4.2 * len(sparsities), 3.4 * len(models)), layout="constrained", squeeze=False
    )
    for line, model in zip(grid, models, strict=True):
        for axes, sparsity in zip(line, sparsities, strict=True):
            for method in METHODS:
                runs = torch.tensor(drawn[(model, sparsity, method)])
                steps = range(1, runs.shape[1] + 1)
                axes.plot(steps, runs.mean(dim=0), color=COLORS[method], label=method)
                axes.fill_between(steps, runs.amin(dim=0), runs.amax(dim=0), color=COLORS[method], alpha=0.15)
            axes.set(
                title=f"{model}, {sparsity:.0%} removed", xlabel="step", ylabel="training loss, mean of an epoch", yscale="log"
            )
    grid[0][-1].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


# cost

COST_BLOCK, COST_DENSITY, COST_RANK, IMAGES = (64, 32), 0.3, 16, 8


def deit_b(method: str) -> nn.Module:
    """DeiT-B with random weights; unless `dense`, 70 % of random blocks removed."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("deit_base_patch16_224")
    if method != "dense":
        for name in prunable_layers(model, Layers()):
            out, columns = model.get_submodule(name).weight.shape
            sparsify(model, {name: torch.rand(out // COST_BLOCK[0], columns // COST_BLOCK[1]) < COST_DENSITY}, COST_BLOCK)
    return model


def start(model: nn.Module, method: str, x: torch.Tensor, labels: torch.Tensor) -> None:
    section = FinetuneSection(method=method if method in METHODS else "full", rank=COST_RANK)  # type: ignore[arg-type]
    names = list(sparse_layers(model))
    if method == "lora_ga":
        factors = {}
        for name, gradient in kept_gradients(model, names, lambda: [(x, labels)], lambda a, b: F.cross_entropy(model(a), b)):
            factors[name] = lora_ga_factors(gradient, COST_RANK)
        for name, adapter in adapt(model, dict.fromkeys(names, COST_RANK), 16.0).items():
            adapter.start(*factors[name])
    elif method == "lora":
        adapt(model, dict.fromkeys(names, COST_RANK), 16.0)
    if method != "dense":  # which trains everything
        choose_trained(model, section)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_step(method: str) -> None:
    """One method in this process: prints parameters, bytes and peak memory as JSON."""
    torch.set_num_threads(1)
    model, x, labels = deit_b(method), torch.randn(IMAGES, 3, 224, 224), torch.randint(0, 1000, (IMAGES,))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    before = peak_mib()
    start(model, method, x, labels)
    after_start = peak_mib()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(trained, FinetuneSection())
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    state = sum(t.numel() * t.element_size() for values in optimizer.state.values() for t in values.values())
    print(
        json.dumps(
            {
                "method": method,
                "trainable_parameters": sum(p.numel() for p in trained),
                "optimizer_mib": state / 2**20,
                "weights_mib": weights / 2**20,
                "peak_before_mib": before,
                "peak_of_start_mib": after_start,
                "peak_mib": peak_mib(),
            }
        )
    )


def product() -> list[dict[str, object]]:
    """eta B_i A_j on kept blocks, forward and backward, against the dense product under the mask, in turns."""
    from lpvit_kernels import kept_product, random_block_sparse

    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for shape in ((3072, 768), (768, 3072), (2304, 768)):
        for block in ((128, 32), (64, 32), (32, 32)):
            pattern = random_block_sparse(shape, block, COST_DENSITY)
            mask = pattern.block_mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            left = torch.randn(shape[0], COST_RANK, requires_grad=True)
            right = torch.randn(COST_RANK, shape[1], requires_grad=True)
            upstream, dense_upstream = torch.randn_like(pattern.values), torch.randn(shape)

            def kept(left=left, right=right, pattern=pattern, upstream=upstream) -> None:  # type: ignore[no-untyped-def]
                kept_product(left, right, pattern).backward(upstream)

            def dense(left=left, right=right, mask=mask, upstream=dense_upstream) -> None:  # type: ignore[no-untyped-def]
                (mask * (left @ right)).backward(upstream)

            times: dict[str, list[float]] = {"kept": [], "dense": []}
            for turn in range(42):
                for name, call in (("kept", kept), ("dense", dense))[:: 1 if turn % 2 else -1]:
                    begun = time.perf_counter()
                    call()
                    if turn >= 2:
                        times[name].append(1e3 * (time.perf_counter() - begun))
            ratio = paired_ratio(times["dense"], times["kept"])
            row = {"shape": shape, "block": block, "density": COST_DENSITY, "rank": COST_RANK}
            row |= {"kept_ms": median(times["kept"]), "dense_ms": median(times["dense"])}
            row |= {"times_faster": ratio.value, "low": ratio.low, "high": ratio.high}
            rows.append(row)
            print(
                f"{shape} in {block}: kept {row['kept_ms']:.2f} ms, dense {row['dense_ms']:.2f} ms, {ratio.value:.2f}x",
                flush=True,
            )
    return rows


def cost(args: argparse.Namespace) -> None:
    steps = []
    for method in ("dense", "full", "lora", "lora_ga"):
        done = subprocess.run([sys.executable, __file__, "step", method], capture_output=True, text=True, check=True)
        steps.append(json.loads(done.stdout.splitlines()[-1]))
        print(done.stdout.strip(), flush=True)
    publish(
        "recovery_cost",
        ("torch", "timm"),
        args.output,
        model="deit_base_patch16_224",
        images=IMAGES,
        block=list(COST_BLOCK),
        density=COST_DENSITY,
        rank=COST_RANK,
        steps=steps,
        product=product(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    of_curves = commands.add_parser("curves")
    of_curves.add_argument("--models", default="digits_vit,digits_swin")
    of_curves.add_argument("--rate", type=float, help="one learning rate for all methods, instead of each one's best")
    of_curves.add_argument("--sparsities", type=float, nargs="+", default=(0.7, 0.8, 0.9), help="ascending")
    of_curves.add_argument("--seeds", type=int, default=3)
    of_curves.add_argument("--cache", type=Path, default=Path("runs/compare"), help="where the trained Swin is kept")
    of_curves.set_defaults(run=curves)
    of_cost = commands.add_parser("cost")
    of_cost.set_defaults(run=cost)
    for command in (of_curves, of_cost):
        command.add_argument("--output", type=Path)
    of_step = commands.add_parser("step", help="one method of cost; used by it")
    of_step.add_argument("method", choices=["dense", "full", "lora", "lora_ga"])
    of_step.set_defaults(run=lambda args: measure_step(args.method))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
