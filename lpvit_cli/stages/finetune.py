"""finetune-lora-ga: recover accuracy on the kept blocks; merge; every zero block still zero -> RUN/finetuned/."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.data import IterableDataset

from lpvit_cli import distributed
from lpvit_cli.data.batches import batches
from lpvit_cli.data.readers import Reader, open_images, require_same_classes
from lpvit_cli.data.splits import validation_batches
from lpvit_cli.data.transforms import transform_for
from lpvit_cli.devices import autocast, describe_device, pick_dtype
from lpvit_cli.errors import CheckFailed, UsageError
from lpvit_cli.files import replace_text
from lpvit_cli.models.families.timm import build_model
from lpvit_cli.models.folder import load_model, read_config, save_model
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.pipeline.run import Run
from lpvit_cli.progress import Progress
from lpvit_cli.recipe import Recipe
from lpvit_cli.recovery.history import read_losses
from lpvit_cli.recovery.lora import adapt, merge, save_adapter
from lpvit_cli.recovery.objective import Objective, Teacher
from lpvit_cli.recovery.start import choose_trained, ranks_of, start_from_gradient
from lpvit_cli.recovery.trainer import Trainer
from lpvit_cli.report.pictures import recovery_picture
from lpvit_cli.report.schema import FinetuneReport
from lpvit_cli.sparse.masks import block_masks, require_same_masks
from lpvit_cli.stages import FINETUNE, PRUNE
from lpvit_cli.tasks.classification import Accuracy
from lpvit_cli.tasks.evaluation import Validation

ROUNDING_POINTS, ROUNDING_IMAGES = 1.0, 3  # how far the accuracy of merged weights may be from that of separate ones


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> FinetuneReport:
    settings = recipe.finetune
    if settings is None:
        raise UsageError("finetune: this recipe turns recovery off (finetune: null)", "give it a finetune section")
    torch.manual_seed(recipe.seed)
    device = run.device
    dtype = pick_dtype(recipe.dtype, device)
    precision = partial(autocast, device, dtype)
    parent, pruned = run.artefact(PRUNE), run.report(PRUNE)
    model = load_model(parent).to(device)
    masks, ranks = block_masks(model), ranks_of(model, settings)
    source = _training_images(recipe, model)
    validation = Validation(validation_batches(recipe.data, model), device, dtype, progress)
    require_same_classes(source, validation.images.source)
    augment = transform_for(model, settings.augment)
    shuffled = {"shuffle": True, "seed": recipe.seed, "batch_size": recipe.data.batch_size}
    train = batches(model, source, recipe.data, transform=augment, augmented=settings.augment is not None, **shuffled)
    objective = Objective(settings, model.num_classes, teacher_of(recipe, model, device))
    folder = run.progress_folder(FINETUNE)

    begun = distributed.broadcast((folder / "checkpoint.safetensors").is_file())
    if settings.method == "lora_ga" and not begun:
        exact = nullcontext if dtype == torch.float16 else precision  # small gradients would be zero in float16
        plain = batches(model, source, recipe.data, **shuffled)
        start_from_gradient(model, ranks, settings, plain, objective, exact, device, progress)
        del plain  # its workers end
    else:
        adapt(model, ranks, settings.alpha)
    choose_trained(model, settings)
    trainer = Trainer(
        model,
        settings,
        train,
        objective,
        lambda: validation.accuracy(model, "validating"),
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
    save_model(work, model.cpu(), {**read_config(parent), "parent": str(parent)})
    written = load_model(work)
    require_same_masks(masks, block_masks(written))
    recovered = validation.accuracy(written, "evaluating the recovered model")
    require_accuracy(recovered, trainer.best_accuracy, trainer.best_epoch)
    skipped = distributed.all_gather(train.skipped)
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


def require_accuracy(written: Accuracy, best: Accuracy, epoch: int) -> None:
    """The model on disk, with its adapters merged, scores what the best epoch did: within the rounding of the merged weights,
    which may turn some images whose first two classes are nearly even."""
    allowed = ROUNDING_POINTS + 100 * ROUNDING_IMAGES / max(1, best.images)
    if abs(written.top1 - best.top1) > allowed:
        which = f"epoch {epoch}" if epoch else "the pruned model (epoch 0)"
        raise CheckFailed(
            f"the recovered model scores {written.top1:.2f} % as written, {which} scored {best.top1:.2f} %",
            "please report this as a bug",
        )


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


def _notes(trainer: Trainer, skipped: list[str], resumed: int) -> list[str]:
    notes = [f"resumed after step {resumed}"] if resumed else []
    if trainer.target_reached and len(trainer.history) < trainer.settings.epochs:
        notes.append(f"stopped after epoch {len(trainer.history)}: finetune.target_top1 is reached")
    if trainer.best_epoch == 0 and trainer.history:
        notes.append("no epoch was better than the pruned model, which is kept: lower finetune.lr, or train longer")
    if skipped:
        notes.append(f"{len(skipped)} unreadable images skipped (first: {skipped[0]})")
    return notes
