"""profile: the layers of a model one by one, dense and block-sparse, on the target -> RUN/profile/profile.json."""

from __future__ import annotations

from pathlib import Path

import torch

from lpvit_cli.bench.profiling import measure_profile
from lpvit_cli.devices import pick_dtype
from lpvit_cli.errors import UsageError
from lpvit_cli.measure.profile import PROFILE_FILE
from lpvit_cli.models.build import build_model
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
    # random weights take as long as trained ones, and need no download
    random = recipe.model.model_copy(update={"pretrained": False, "weights": None})
    model = build_model(random, recipe.task, recipe.features)
    profile, notes = measure_profile(
        model,
        prunable_layers(model, recipe.prune.layers),
        recipe.prune.blocks,
        name=recipe.model.name,
        device=device,
        dtype=pick_dtype(recipe.target_dtypes[0], device),
        threads=target.threads,
        batch_size=target.batch_size,
        rounds=recipe.profile.rounds,
        energy=recipe.bench.energy,
        progress=progress,
    )
    profile.save(work / PROFILE_FILE)
    return ProfileReport(device=profile.device, notes=notes, profile=profile)
