"""evaluate: how good any model that lpvit can open is at its task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lpvit_cli.commands.reference import reference_of
from lpvit_cli.data.batches import Batches, batches
from lpvit_cli.data.files import ALL, FolderReader, split_folders
from lpvit_cli.data.readers import is_labelled, open_images, require_known_classes, require_same_classes
from lpvit_cli.devices import autocast, describe_device, pick_device, pick_dtype
from lpvit_cli.errors import UsageError
from lpvit_cli.export.opening import open_model
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.progress import Progress
from lpvit_cli.recipe.data import DataSection
from lpvit_cli.recovery.objective import Teacher
from lpvit_cli.report.schema import EvaluateReport
from lpvit_cli.sparse import freeze
from lpvit_cli.targets.base import ExportedModel
from lpvit_cli.tasks.evaluation import Validation, task_of

WORKERS = min(4, (os.cpu_count() or 1) - 1)  # processes that decode images


def evaluate(
    model_name: str,
    dataset: str | None,
    root: Path | None,
    split: str | None,
    limit: int | None,
    batch_size: int,
    device_name: str,
    dtype_name: str,
    reference: str | None,
    train: Path | None,
    labels: str | None,
    progress: Progress,
) -> EvaluateReport:
    """The quality of MODEL; images default to those its model folder or file remembers.

    `reference`: another model that it is compared with, or "dense", the one that it was made of; `train`: a folder with one
    folder for each class, among whose images embeddings look for their neighbours; `labels`: "none" where folders and labels
    are no classes.
    """
    model, remembered = open_model(model_name)
    place = where_images_are(remembered, dataset, root, split)
    if split is None and train and _is_place(train, place["root"]) and not split_folders(train):
        place["val_split"] = "validation"  # a share of them; the gallery takes the rest
    if labels is not None:
        if labels not in ("auto", "none"):
            raise UsageError(f"--labels {labels}: unknown", "use none where folders are no classes, else auto")
        place["labels"] = labels
    if place["dataset"] is None:
        raise UsageError(f"{model_name}: which images?", "pass --dataset folder --root /path/to/imagenet")
    data = DataSection.model_validate(place | {"val_images": limit, "batch_size": batch_size, "workers": WORKERS})
    device = torch.device("cpu") if isinstance(model, ExportedModel) else pick_device(device_name)
    source = open_images(data, data.val_split, model)
    require_known_classes(model, source)
    images = batches(model, source, data, limit=limit)
    dtype = torch.float32 if isinstance(model, ExportedModel) else pick_dtype(dtype_name, device)
    other = reference_of(model, model_name, reference) if reference else None
    gallery = _gallery(model, data, train, images)
    _require_a_measure(model, images, other, gallery)
    validation = Validation(images, device, dtype, progress, task_of(model), other, gallery)
    with autocast(device, dtype):
        frozen = freeze(model.eval().to(device), min(images.share or batch_size, batch_size))
    quality = validation.quality(frozen, "evaluating")
    return EvaluateReport(
        device=describe_device(device),
        model=model_name,
        dataset=f"{data.dataset} {root if data.val_split == ALL else data.val_split}",
        quality=quality,
        reference=reference,
        available=images.available,
        skipped_images=len(images.skipped),
        notes=images.notes(skipped=[]),
    )


def _gallery(model: VisionModel, data: DataSection, train: Path | None, images: Batches) -> Batches | None:
    if train is None:
        return None
    if model.num_classes:
        raise UsageError("--train is for k-NN among embeddings, and this model tells classes apart", "leave --train out")
    there = data.model_copy(update={"dataset": "folder", "root": train.expanduser().resolve(), "val_images": None})
    apart = split_folders(train) or (_is_place(train, data.root) and data.val_split != ALL)
    source = open_images(there, there.train_split if apart else ALL, model)
    if not is_labelled(source):
        raise UsageError(f"--train {train}: has no classes", "give a folder with one folder for each class")
    if images.labelled:
        require_same_classes(source, images.source)
    if twice := sorted(_files(source) & _files(images.source)):
        raise UsageError(
            f"--train {train}: holds images that are evaluated ({len(twice)}, first: {twice[0]}), which would find themselves",
            "give other images, or the same folder for --root and --train without --split: lpvit then divides it",
        )
    return batches(model, source, there)


def _files(source: object) -> set[str]:
    """The files of a folder's images, links followed."""
    if not isinstance(source, FolderReader):
        return set()
    return {os.path.realpath(source.root / path) for path in source.paths}


def _require_a_measure(model: VisionModel, images: Batches, other: Teacher | None, gallery: Batches | None) -> None:
    if model.num_classes:
        if not images.labelled and other is None:
            raise UsageError(
                "these images have no labels to judge by", "pass --reference MODEL, or --reference dense: what it was made of"
            )
        return
    if gallery is not None and not images.labelled:
        raise UsageError("--train: k-NN needs classes, and the images have none", "evaluate on one folder for each class")
    if other is None and gallery is None:
        raise UsageError(
            "this model gives embeddings: there is nothing to judge them by",
            "pass --reference MODEL, or --reference dense, or --train FOLDER for k-NN",
        )


def where_images_are(remembered: dict[str, Any], dataset: str | None, root: Path | None, split: str | None) -> dict[str, Any]:
    """Dataset, root and split as the user names them, else as a model folder or file remembers them.

    A folder that the user names is taken whole where it has no folders of splits; the remembered one is split as it was.
    """
    dataset = dataset or remembered.get("dataset") or ("folder" if root else None)
    same = dataset == remembered.get("dataset")
    place = root or (remembered.get("root") if same else None) or None
    if split is None and dataset == "folder" and root and not (same and _is_place(root, remembered.get("root"))):
        split = None if split_folders(root) else ALL
    how: dict[str, Any] = {key: remembered[key] for key in ("labels", "exif") if same and not root and key in remembered}
    return {"dataset": dataset, "root": place, "val_split": split or remembered.get("split", "validation"), **how}


def _is_place(root: Path, remembered: Path | str | None) -> bool:
    return bool(remembered) and root.expanduser().resolve() == Path(str(remembered)).resolve()
