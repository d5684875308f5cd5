"""finetune-lora-ga: recover accuracy on the kept blocks; merge; every zero block still zero -> RUN/finetuned/."""

from __future__ import annotations

import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import IterableDataset

from lpvit_cli import distributed
from lpvit_cli.data.batches import batches
from lpvit_cli.data.readers import Reader, open_images, require_same_classes
from lpvit_cli.data.transforms import transform_for
from lpvit_cli.devices import autocast, describe_device, pick_dtype
from lpvit_cli.errors import UsageError
from lpvit_cli.files import replace_text
from lpvit_cli.models.build import build_model
from lpvit_cli.models.folder import load_model, read_config, save_model
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.pipeline.run import Run
from lpvit_cli.progress import Progress
from lpvit_cli.recipe import Recipe
from lpvit_cli.recovery.history import read_losses
from lpvit_cli.recovery.lora import adapters_of, merge, save_adapter
from lpvit_cli.recovery.objective import objective_of, teacher_of
from lpvit_cli.recovery.recover import recover
from lpvit_cli.recovery.start import ranks_of
from lpvit_cli.report.pictures import recovery_picture
from lpvit_cli.report.schema import FinetuneReport
from lpvit_cli.sparse.masks import block_masks, require_same_masks
from lpvit_cli.stages import FINETUNE, PRUNE
from lpvit_cli.tasks.evaluation import require_same_quality, validation_of


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> FinetuneReport:
    settings = recipe.finetune
    if settings is None:
        raise UsageError("finetune: this recipe turns recovery off (finetune: null)", "give it a finetune section")
    torch.manual_seed(recipe.seed)
    device = run.device
    dtype = pick_dtype(recipe.dtype, device)
    parent, pruned = run.artefact(PRUNE), run.report(PRUNE)
    model = load_model(parent).to(device)
    masks = block_masks(model)
    ranks_of(model, settings)  # what is wrong with them is told before images are read
    source = _training_images(recipe, model)
    dense = build_model(run.origin or recipe.model, recipe.task, recipe.features)
    teacher = teacher_of(settings.distill, dense, model, device)
    validation = validation_of(recipe.data, recipe.calibrate, model, dense, device, dtype, progress)
    if model.num_classes:
        require_same_classes(source, validation.images.source)
    augment = transform_for(model, settings.augment)
    shuffled = {"shuffle": True, "seed": recipe.seed, "batch_size": recipe.data.batch_size}
    train = batches(model, source, recipe.data, transform=augment, augmented=settings.augment is not None, **shuffled)
    objective = objective_of(settings, validation.task, model.num_classes, teacher, train.labelled)
    trainer, resumed = recover(
        model,
        settings,
        train,
        batches(model, source, recipe.data, **shuffled),
        objective,
        lambda: validation.quality(model, "validating", neighbours=False),
        pruned.quality,
        seed=recipe.seed,
        device=device,
        progress=progress,
        folder=run.progress_folder(FINETUNE),
        precision=partial(autocast, device, dtype),
        dtype=dtype,
    )
    adapted = bool(adapters_of(model))
    if adapted:
        save_adapter(work, model, parent)
    merge(model)
    save_model(work, model.cpu(), {**read_config(parent), "parent": str(parent)})
    written = load_model(work)
    require_same_masks(masks, block_masks(written))
    recovered = validation.quality(written, "evaluating the recovered model")
    require_same_quality(recovered, cast(Any, trainer.best_quality), trainer.best_epoch)
    skipped = distributed.all_gather(train.skipped)
    report = FinetuneReport(
        device=describe_device(device),
        notes=[*trainer.notes(resumed), *train.notes(skipped)],
        method=settings.method,
        rank=settings.rank if adapted else None,
        trainable_parameters=sum(p.numel() for p in trainer.trained.values()),
        all_parameters=sum(parameter.numel() for parameter in model.parameters()),
        optimizer_bytes=trainer.optimizer_bytes,
        processes=distributed.world(),
        quality_dense=pruned.quality_dense,
        quality_pruned=pruned.quality,
        quality=recovered,
        best_epoch=trainer.best_epoch,
        history=trainer.history,
        skipped_images=len(skipped),
    )
    if trainer.log.path and trainer.log.path.is_file():
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
