"""profile: the layers of a model one by one, dense and block-sparse, on this device -> RUN/profile/profile.json."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from lpvit_cli.bench.profiling import (
    MODEL,
    TRIALS,
    WARMUP_SECONDS,
    advice,
    distinct_layers,
    layer_profile,
    layer_subjects,
    millijoules,
)
from lpvit_cli.bench.work import work_of
from lpvit_cli.devices import describe_device, pick_dtype, type_name
from lpvit_cli.errors import UsageError
from lpvit_cli.measure.energy.run import energy_on
from lpvit_cli.measure.machine import provenance
from lpvit_cli.measure.profile import PROFILE_FILE, DeviceProfile
from lpvit_cli.measure.timing import Subject, cpu_threads, time_interleaved
from lpvit_cli.models.families.timm import build_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.pipeline.run import Run
from lpvit_cli.progress import Progress
from lpvit_cli.recipe import Recipe
from lpvit_cli.report.schema import ProfileReport


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> ProfileReport:
    torch.manual_seed(recipe.seed)
    target, device = recipe.target, run.target_device
    if target.runtime != "torch":
        raise UsageError(
            f"profile: layers are timed in torch, not in {target.runtime}", "profile with --set target.runtime=torch"
        )
    dtype = pick_dtype(recipe.target_dtypes[0], device)
    # random weights take as long as trained ones, and need no download
    model = build_model(recipe.model.model_copy(update={"pretrained": False, "weights": None}))
    blocks = recipe.prune.blocks
    layers = distinct_layers(model, prunable_layers(model, recipe.prune.layers), blocks, target.batch_size)
    images = torch.randn(target.batch_size, *model.pretrained_cfg["input_size"]).to(device, dtype)
    subjects: dict[str, Subject] = {MODEL: partial(model.to(device, dtype), images)}
    with cpu_threads(target.threads), torch.inference_mode():
        for layer in layers:
            subjects |= layer_subjects(layer, blocks, device, dtype)
        timing = time_interleaved(
            subjects,
            device=device,
            rounds=recipe.profile.rounds,
            warmup_seconds=WARMUP_SECONDS,
            on_round=lambda done, total: progress("timing the layers", done, total, f"round {done}/{total}"),
        )
        energy, reasons = energy_on(
            device,
            subjects,
            images_per_call=1,  # joules per call, whatever it holds
            trials=TRIALS,
            window_s=recipe.bench.energy.window_seconds,
            allow_mig=recipe.bench.energy.allow_mig,
            on_trial=lambda done, total: progress("energy of the layers", done, total, f"trial {done}/{total}"),
        )
        ms = {name: timed.percentiles.p50 for name, timed in timing.subjects.items()}
        mj = millijoules(energy)
        profile = DeviceProfile(
            device=describe_device(device),
            dtype=type_name(dtype),
            threads=timing.threads,
            model=recipe.model.name,
            batch_size=target.batch_size,
            provenance=provenance("lpvit", "torch", "timm", "triton"),
            model_ms=ms[MODEL],
            model_mj=mj.get(MODEL),
            model_work=work_of(model, images),
            energy_source=energy.source if energy and mj else None,
            energy_reasons=reasons,
            layers=[layer_profile(layer, blocks, ms, mj) for layer in layers],
        )
    profile.save(work / PROFILE_FILE)
    return ProfileReport(device=profile.device, notes=advice(timing, profile), profile=profile)
