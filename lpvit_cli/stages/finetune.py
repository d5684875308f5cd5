"""finetune-lora-ga: recover accuracy on the kept blocks; merge; every zero block still zero -> RUN/finetuned/."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lpvit_cli import distributed
from lpvit_cli.data import Batch, Batches, Reader, batches, open_images, require_same_classes, transform_for
from lpvit_cli.errors import CheckFailed, UsageError
from lpvit_cli.lora import adapt, kept_gradients, lora_ga_factors, merge, save_adapter
from lpvit_cli.models import (
    VisionModel,
    autocast,
    build_model,
    describe_device,
    device_of,
    load_model,
    pick_dtype,
    read_config,
    save_model,
)
from lpvit_cli.recipe import FinetuneSection, Recipe
from lpvit_cli.report.pictures import recovery_picture
from lpvit_cli.report.schema import FinetuneReport, PruneReport
from lpvit_cli.run import Progress, Run, replace_text
from lpvit_cli.sparse import sparse_layers
from lpvit_cli.stages import FINETUNE, PRUNE
from lpvit_cli.stages.evaluate import evaluate_model, validation_batches
from lpvit_cli.training.history import read_losses
from lpvit_cli.training.objective import Objective, Teacher
from lpvit_cli.training.trainer import Trainer


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> FinetuneReport:
    settings = recipe.finetune
    if settings is None:
        raise UsageError("finetune: this recipe turns recovery off (finetune: null)", "give it a finetune section")
    torch.manual_seed(recipe.seed)
    device = device_of(recipe)
    dtype = pick_dtype(recipe.dtype, device)
    precision = partial(autocast, device, dtype)
    parent, pruned = run.artefact(PRUNE), run.report(PRUNE, PruneReport)
    model = load_model(parent).to(device)
    masks, ranks = block_masks(model), ranks_of(model, settings)
    source, validation = _training_images(recipe, model), validation_batches(recipe, model)
    require_same_classes(source, validation.source)
    augment = transform_for(model, settings.augment)
    train = batches(
        model, source, recipe.data, shuffle=True, seed=recipe.seed, transform=augment, augmented=settings.augment is not None
    )
    objective = Objective(settings, model.num_classes, teacher_of(recipe, model, device))
    folder = run.progress_folder(FINETUNE)

    begun = distributed.from_main((folder / "checkpoint.safetensors").is_file())
    if settings.method == "lora_ga" and not begun:
        plain = batches(model, source, recipe.data, shuffle=True, seed=recipe.seed)
        exact = nullcontext if dtype == torch.float16 else precision  # small gradients would be zero in float16
        start_from_gradient(model, ranks, settings, plain, objective, exact, device, progress)
    else:
        adapt(model, ranks, settings.alpha)
    choose_trained(model, settings)
    trainer = Trainer(
        model,
        settings,
        train,
        objective,
        lambda: evaluate_model(model, validation, recipe, device, progress, "validating"),
        pruned.accuracy,
        folder,
        recipe.seed,
        device,
        precision,
        torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )
    resumed = trainer.resume()
    trainer.fit(lambda done, total, detail: progress("recovering", done, total, detail))

    if ranks:
        save_adapter(work, model, parent)
    merge(model)
    recovered = evaluate_model(model, validation, recipe, device, progress, "evaluating the recovered model")
    save_model(work, model.cpu(), {**read_config(parent), "parent": str(parent)})
    require_same_masks(masks, block_masks(load_model(work)))
    skipped = distributed.from_all(train.skipped)
    report = FinetuneReport(
        device=describe_device(device),
        notes=_notes(trainer, skipped, resumed),
        method=settings.method,
        rank=settings.rank if ranks else None,
        trainable_parameters=sum(p.numel() for p in trainer.trained.values()),
        all_parameters=sum(parameter.numel() for parameter in model.parameters()),
        optimizer_bytes=trainer.optimizer_bytes,
        processes=distributed.world(),
        accuracy_dense=pruned.accuracy_dense,
        accuracy_pruned=pruned.accuracy,
        accuracy=recovered,
        best_epoch=trainer.best_epoch,
        history=trainer.history,
        skipped_images=len(skipped),
    )
    if trainer.log.path.is_file():
        shutil.copyfile(trainer.log.path, work / "history.jsonl")
        if find_spec("matplotlib"):
            replace_text(work / "history.svg", recovery_picture(report, read_losses(work / "history.jsonl")))
    return report


def _training_images(recipe: Recipe, model: VisionModel) -> Reader:
    source = open_images(recipe.data, recipe.data.train_split, model)
    if isinstance(source, IterableDataset):
        raise UsageError(
            f"data.dataset: recovery needs shuffled epochs, which {recipe.data.dataset!r} as a stream cannot give",
            "use a folder, tar or hfds/ dataset, or leave recovery out: --set finetune=null",
        )
    return source


def teacher_of(recipe: Recipe, model: VisionModel, device: torch.device) -> Teacher | None:
    """The teacher of distillation, where there is one: the dense parent, unless the recipe names another model."""
    distill = recipe.finetune.distill if recipe.finetune else None
    if distill is None:
        return None
    teacher = build_model(distill.teacher or recipe.model)
    if teacher.num_classes != model.num_classes:
        raise UsageError(
            f"finetune.distill.teacher: tells {teacher.num_classes} classes apart, the model {model.num_classes}",
            "take a teacher trained on the same classes, or --set finetune.distill=null",
        )
    return Teacher(teacher, model).to(device)


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
    head: Any = model.get_classifier() if "head" in settings.also_train else None  # type: ignore[operator]
    heads = {id(p) for p in head.parameters()} if head is not None else set()
    values = {id(layer.values) for layer in sparse_layers(model).values()} if settings.method == "full" else set()
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        weight = parameters.get(f"{owner}.weight")
        bias = leaf.endswith("bias") and (weight is None or weight.ndim > 1)  # that of a norm belongs to the norm
        kind = "biases" if bias else "norms"
        chosen = leaf in ("lora_a", "lora_b") or id(parameter) in heads | values
        parameter.requires_grad_(chosen or (parameter.ndim == 1 and kind in settings.also_train))


def _notes(trainer: Trainer, skipped: list[str], resumed: int) -> list[str]:
    notes = [f"resumed after step {resumed}"] if resumed else []
    if trainer.target_reached and len(trainer.history) < trainer.settings.epochs:
        notes.append(f"stopped after epoch {len(trainer.history)}: finetune.target_top1 is reached")
    if trainer.best_epoch == 0 and trainer.history:
        notes.append("no epoch was better than the pruned model, which is kept: lower finetune.lr, or train longer")
    if skipped:
        notes.append(f"{len(skipped)} unreadable images skipped (first: {skipped[0]})")
    return notes


def block_masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.block_mask.cpu() for name, layer in sparse_layers(model).items()}


def require_same_masks(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """The promise of this stage, checked on what was written: no removed block has come back."""
    changed = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
    if changed or before.keys() != after.keys():
        raise CheckFailed(
            f"zero blocks were filled in {changed[0] if changed else 'new layers'}", "please report this as a bug"
        )
