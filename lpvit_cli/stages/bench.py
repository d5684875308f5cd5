"""bench: dense, masked-dense and sparse in one interleaved run; time, energy where a meter can be read -> RUN/bench/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lpvit_cli.measure.energy import energy_on
from lpvit_cli.measure.machine import installed, machine
from lpvit_cli.measure.timing import cpu_threads, time_interleaved, verdict
from lpvit_cli.models import VisionModel, build_model, describe_device, device_of, load_model, pick_dtype
from lpvit_cli.recipe import Recipe
from lpvit_cli.report.html import write_html
from lpvit_cli.report.schema import BASELINE, BatchBench, BenchReport
from lpvit_cli.run import Progress, Run
from lpvit_cli.sparse import densify, fuse, sparse_layers, trim
from lpvit_cli.stages import BENCH
from lpvit_cli.stages.lineage import made_by
from lpvit_cli.stages.tune import run_dense, tune_model


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> BenchReport:
    torch.manual_seed(recipe.seed)
    settings, device = recipe.bench, device_of(recipe)
    dtype = pick_dtype(settings.dtype or recipe.dtype, device)
    with cpu_threads(settings.threads):
        source = run.model_artefact(BENCH)
        pruned_model = load_model(source).to(device, dtype)
        sparse = trim(pruned_model)
        models = {
            BASELINE: build_model(recipe.model).to(device, dtype),
            "masked-dense": densify(pruned_model),
            "sparse": fuse(sparse),
        }
        tune_model(sparse, settings.batch_sizes, ("forward",), progress, again=False)
        measured = [_bench_batch(models, size, recipe, device, dtype, progress) for size in settings.batch_sizes]
        pruned, finetuned = made_by(run, BENCH)
        report = BenchReport(
            device=describe_device(device),
            notes=[*advice(measured), *_layers_run_dense(sparse, settings.batch_sizes)],
            model=source.name,
            dtype=str(dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            machine=machine(),
            versions={package: installed(package) for package in ("lpvit", "torch", "timm", "triton")},
            flops_dense=pruned.flops_dense,
            flops=pruned.flops,
            batches=measured,
        )
    write_html(work / "report.html", recipe.name, report, pruned, finetuned)
    return report


def _layers_run_dense(model: VisionModel, batch_sizes: tuple[int, ...]) -> list[str]:
    """What a user must know to read the ratios."""
    layers, counts = len(sparse_layers(model)), {size: len(run_dense(model, size)) for size in batch_sizes}
    where = ", ".join(f"{count} of {layers} at batch {size}" for size, count in counts.items() if count)
    return [f"block-sparse layers that run as dense ones, which is faster here: {where} (see lpvit tune)"] if where else []


def _bench_batch(
    models: dict[str, VisionModel],
    batch_size: int,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> BatchBench:
    """All models on the same random images; `dense` is the baseline of every ratio."""
    settings = recipe.bench
    model = models[BASELINE]
    generator = torch.Generator().manual_seed(recipe.seed)
    images = torch.randn(batch_size, *model.pretrained_cfg["input_size"], generator=generator).to(device)
    subjects = {name: forward_of(model, images.to(dtype)) for name, model in models.items()}
    what = f"timing batch {batch_size}"
    timing = time_interleaved(
        subjects,
        device=device,
        rounds=settings.rounds,
        warmup_seconds=settings.warmup_seconds,
        on_round=lambda done, total: progress(what, done, total, f"round {done}/{total}"),
    )
    speedup = {name: timing.ratio(BASELINE, name) for name in models if name != BASELINE}
    sentence = verdict("sparse", "dense PyTorch", speedup["sparse"], timing, timing.subjects["sparse"])
    energy, reasons = energy_on(
        device,
        subjects,
        batch_size,
        trials=settings.energy.trials,
        window_s=settings.energy.window_seconds,
        on_trial=lambda done, total: progress(f"energy, batch {batch_size}", done, total, f"trial {done}/{total}"),
    )
    return BatchBench(
        batch_size=batch_size,
        timing=timing,
        speedup=speedup,
        images_per_second={name: 1000 * batch_size / timed.percentiles.p50 for name, timed in timing.subjects.items()},
        verdict=f"batch {batch_size}: {sentence}",
        energy=energy,
        energy_reasons=reasons,
    )


def advice(batches: list[BatchBench]) -> list[str]:
    """Where the sparse model pays, when it does not everywhere; and how far the tails can be trusted."""
    rounds = min(len(timed.samples_ms) for batch in batches for timed in batch.timing.subjects.values())
    notes = [f"{rounds} rounds: p99 is close to the slowest of them"] if rounds < 100 else []
    if any(batch.timing.busy for batch in batches):
        return notes
    faster = [batch.batch_size for batch in batches if batch.speedup["sparse"].low > 1]
    slower = [batch.batch_size for batch in batches if batch.speedup["sparse"].high < 1]
    if slower and faster and min(faster) > max(slower):
        notes.append(
            f"batch {max(slower)} gives a block too little work; of the batches measured, sparse pays from {min(faster)} on"
        )
    elif slower:
        notes.append("where sparse is slower, blocks are too small or too few are gone: try taller blocks or more sparsity")
    return notes


def forward_of(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """The call that is timed."""

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    return forward
