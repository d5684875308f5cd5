"""Which parameters recovery trains, and where adapters start."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lpvit_cli.data.batches import Batch, Batches
from lpvit_cli.errors import UsageError
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.progress import Progress
from lpvit_cli.recipe.finetune import FinetuneSection
from lpvit_cli.recovery.lora import adapt, kept_gradients, lora_ga_factors
from lpvit_cli.recovery.objective import Objective
from lpvit_cli.sparse import sparse_layers


def ranks_of(model: nn.Module, settings: FinetuneSection) -> dict[str, int]:
    """The rank of every layer that gets an adapter. Raises UsageError for globs that match none, and for ranks too large."""
    layers = sparse_layers(model)
    if settings.method == "full":
        return {}
    globs = settings.rank if isinstance(settings.rank, dict) else {"*": settings.rank}
    for glob in globs:
        if not any(fnmatch(name, glob) for name in layers):
            near = difflib.get_close_matches(glob, layers, n=3, cutoff=0) or ["none"]
            raise UsageError(
                f"finetune.rank: {glob!r} matches no pruned layer",
                f"near names: {', '.join(near)}; globs such as '*.mlp.*' match several",
            )
    found = {name: next((rank for glob, rank in globs.items() if fnmatch(name, glob)), None) for name in layers}
    ranks = {name: rank for name, rank in found.items() if rank is not None}
    twice = 2 if settings.method == "lora_ga" else 1
    for name, rank in ranks.items():
        smaller = min(layers[name].out_features, layers[name].in_features)
        if twice * rank > smaller:
            needs = "LoRA-GA needs twice the rank" if twice == 2 else "LoRA needs the rank"
            raise UsageError(
                f"finetune.rank: {rank} is too large: {needs} in both dimensions of a layer, {name} has {smaller}",
                f"use at most {smaller // twice} there",
            )
    return ranks


def start_from_gradient(
    model: VisionModel,
    ranks: dict[str, int],
    settings: FinetuneSection,
    images: Batches,
    objective: Objective,
    precision: Callable[[], AbstractContextManager[object]],
    device: torch.device,
    progress: Progress,
) -> None:
    """Put adapters on the layers, started from the gradient of `init_batches` batches of images as they are (not augmented)."""

    def first() -> Iterator[Batch]:
        return islice(images.epoch(settings.epochs), settings.init_batches)

    def loss_of(x: Tensor, labels: Tensor) -> Tensor:
        with precision():
            return objective(model, x.to(device), labels.to(device), mix=False)[0]

    factors = {}
    for name, gradient in kept_gradients(model, ranks, first, loss_of):
        factors[name] = lora_ga_factors(gradient, ranks[name], settings.gamma)
        progress("LoRA-GA start", len(factors), len(ranks), f"{name}, gradient of {settings.init_batches} batches")
    for name, adapter in adapt(model, ranks, settings.alpha).items():
        adapter.start(*factors[name])


def choose_trained(model: nn.Module, settings: FinetuneSection) -> None:
    """Let adapters (or, with `full`, kept blocks) require a gradient, and what the recipe trains besides; nothing else."""
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    heads = {id(p) for p in _head(model).parameters()} if "head" in settings.also_train else set()
    values = {id(layer.values) for layer in sparse_layers(model).values()} if settings.method == "full" else set()
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        weight = parameters.get(f"{owner}.weight")
        bias = leaf.endswith("bias") and (weight is None or weight.ndim > 1)  # that of a norm belongs to the norm
        kind = "biases" if bias else "norms"
        chosen = leaf in ("lora_a", "lora_b") or id(parameter) in heads | values
        parameter.requires_grad_(chosen or (parameter.ndim == 1 and kind in settings.also_train))


def _head(model: Any) -> nn.Module:
    """The classifier, as timm's models tell it; of distilled ones both. Raises UsageError where there is none."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(head, tuple):
        head = nn.ModuleList(head)
    if not isinstance(head, nn.Module) or not list(head.parameters()):
        raise UsageError("finetune.also_train: head: this model has no head that lpvit knows", "leave it out: [norms, biases]")
    return head
