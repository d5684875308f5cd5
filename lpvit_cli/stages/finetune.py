"""finetune-lora-ga: recover accuracy on the kept blocks; merge; every zero block still zero -> RUN/finetuned/."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lpvit_cli.data import batches, open_images, require_same_classes, transform_for
from lpvit_cli.errors import CheckFailed, UsageError
from lpvit_cli.lora import adapt, merge
from lpvit_cli.lora.init import kept_gradients, lora_ga_init
from lpvit_cli.lora.train import Trainer, distilled_loss
from lpvit_cli.models import autocast, build_model, describe_device, device_of, load_model, pick_dtype, read_config, save_model
from lpvit_cli.recipe import Recipe
from lpvit_cli.report.schema import FinetuneReport, PruneReport
from lpvit_cli.run import Progress, Run
from lpvit_cli.sparse import sparse_layers
from lpvit_cli.stages import FINETUNE, PRUNE
from lpvit_cli.stages.evaluate import evaluate_model, validation_batches


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> FinetuneReport:
    settings = recipe.finetune
    if settings is None:
        raise UsageError("finetune: this recipe turns recovery off (finetune: null)", "give it a finetune section")
    torch.manual_seed(recipe.seed)
    device = device_of(recipe)
    dtype = pick_dtype(recipe.dtype, device)
    parent = run.artefact(PRUNE)
    model = load_model(parent).to(device)
    masks = block_masks(model)
    teacher = build_model(recipe.model).requires_grad_(False).to(device) if settings.distill else None

    source = open_images(recipe.data, recipe.data.train_split, model)
    if isinstance(source, IterableDataset):
        raise UsageError(
            f"data.dataset: recovery needs shuffled epochs, which {recipe.data.dataset!r} as a stream cannot give",
            "use a folder, tar or hfds/ dataset, or leave recovery out: --set finetune=null",
        )
    train = batches(
        model, source, recipe.data, shuffle=True, seed=recipe.seed, transform=transform_for(model, settings.augment)
    )
    validation = validation_batches(recipe, model)
    require_same_classes(source, validation.source)
    require_rank(settings.rank, model)
    loss_of = distilled_loss(model, teacher, settings.distill, settings.label_smoothing, device)

    def precision() -> torch.autocast:
        return autocast(device, dtype)

    def loss_only(images: Tensor, labels: Tensor) -> Tensor:
        with precision():
            return loss_of(images, labels)[0]

    checkpoint = run.progress_folder(FINETUNE) / "checkpoint.safetensors"
    gradients = {}
    if not checkpoint.is_file():
        progress("LoRA-GA start", 0, 1, f"gradient of {settings.init_batches} batches")
        gradients = kept_gradients(model, islice(train.epoch(settings.epochs), settings.init_batches), loss_only)
    adapters = adapt(model, settings.rank, settings.alpha)
    for name, gradient in gradients.items():
        lora_ga_init(adapters[name], gradient, settings.gamma)
    trainer = Trainer(model, settings, len(train), checkpoint, recipe.seed)
    resumed = trainer.resume()
    trainable = sum(parameter.numel() for parameter in trainer.parameters)

    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    while len(trainer.history) < settings.epochs:
        at = f"epoch {len(trainer.history) + 1}/{settings.epochs}"

        def on_step(step: int, loss: float, top1: float, rate: float, at: str = at) -> None:
            progress("recovering", step, len(train), f"{at}  loss {loss:.3f}  accuracy {top1:.1f} %  {rate:.0f} images/s")

        trainer.epoch(train.epoch(len(trainer.history)), loss_of, precision, scaler, on_step)
        require_finite(trainer.history[-1].loss, at)
        trainer.save()

    merge(model)
    require_same_masks(masks, block_masks(model))
    recovered = evaluate_model(model, validation, recipe, device, progress, "evaluating the recovered model")
    save_model(work, model.cpu(), {**read_config(parent), "parent": str(parent)})
    require_same_masks(masks, block_masks(load_model(work)))
    pruned = run.report(PRUNE, PruneReport)
    notes = [f"resumed after epoch {resumed}"] if resumed else []
    if train.skipped:
        notes.append(f"{len(train.skipped)} unreadable images skipped (first: {train.skipped[0]})")
    return FinetuneReport(
        device=describe_device(device),
        notes=notes,
        rank=settings.rank,
        trainable_parameters=trainable,
        all_parameters=sum(parameter.numel() for parameter in model.parameters()),
        accuracy_dense=pruned.accuracy_dense,
        accuracy_pruned=pruned.accuracy,
        accuracy=recovered,
        history=trainer.history,
        skipped_images=len(train.skipped),
    )


def block_masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.block_mask.cpu() for name, layer in sparse_layers(model).items()}


def require_same_masks(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """The promise of this stage, checked on the weights as they are: no removed block has come back."""
    changed = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
    if changed or before.keys() != after.keys():
        raise CheckFailed(
            f"zero blocks were filled in {changed[0] if changed else 'new layers'}", "please report this as a bug"
        )


def require_finite(loss: float, at: str) -> None:
    if not math.isfinite(loss):
        raise CheckFailed(f"recovery diverged: the loss is {loss} in {at}", "lower finetune.lr, or use --dtype float32")


def require_rank(rank: int, model: nn.Module) -> None:
    smallest = min(min(layer.out_features, layer.in_features) for layer in sparse_layers(model).values())
    if 2 * rank > smallest:
        raise UsageError(
            f"finetune.rank: {rank} is too large: LoRA-GA needs twice the rank in every layer, the smallest has {smallest}",
            f"use at most {smallest // 2}",
        )
