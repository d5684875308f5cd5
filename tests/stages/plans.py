"""Plans of small models in memory, without a run folder, for many tests."""

from __future__ import annotations

from typing import Any

import torch
from helpers import MODELS, random_model
from torch import Tensor

from lpvit_cli import Recipe
from lpvit_cli.curvature import collect
from lpvit_cli.measure.profile import DeviceProfile
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.pruning.plan import Plan, build_plan
from lpvit_cli.tasks.classification import Classification, calibration_loss

CPU = torch.device("cpu")
BLOCK = (16, 8)


def quiet(*args: object) -> None:
    pass


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 32, 32, generator=generator), torch.randint(5, (n,), generator=generator)) for n in sizes]


def plan_of(which: str, *overrides: str, profile: DeviceProfile | None = None) -> Plan:
    name, kwargs = MODELS[which]
    model: Any = random_model(which)
    facts = ["device=cpu", "model.weights=null", f"model.name={name}", "prune.block=[16,8]", "prune.reweigh=0", *overrides]
    recipe = Recipe.load("digits_vit", facts)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"kwargs": kwargs})})
    images = batches(10, 14)
    layers = prunable_layers(model, recipe.prune.layers)
    statistics = collect(model, layers, images, calibration_loss("empirical", 0), CPU, quiet)
    return build_plan(
        recipe.prune,
        model,
        layers,
        statistics,
        images,
        example=images[0][0][:1],
        task=Classification(),
        gradient="empirical",
        seed=recipe.seed,
        device=CPU,
        progress=quiet,
        profile=profile,
    )
