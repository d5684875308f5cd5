"""evaluate: the accuracy of any model that lpvit can open."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lpvit_cli.data.batches import batches
from lpvit_cli.data.files import ALL, split_folders
from lpvit_cli.data.readers import open_images, require_known_classes, require_labels
from lpvit_cli.devices import describe_device, pick_device, pick_dtype
from lpvit_cli.errors import UsageError
from lpvit_cli.export.opening import open_model
from lpvit_cli.progress import Progress
from lpvit_cli.recipe.data import DataSection
from lpvit_cli.report.schema import EvaluateReport
from lpvit_cli.targets.base import ExportedModel
from lpvit_cli.tasks.evaluation import Validation

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
    progress: Progress,
) -> EvaluateReport:
    """Accuracy of MODEL; images default to those its model folder or file remembers."""
    model, remembered = open_model(model_name)
    place = where_images_are(remembered, dataset, root, split)
    if place["dataset"] is None:
        raise UsageError(f"{model_name}: which images?", "pass --dataset folder --root /path/to/imagenet")
    data = DataSection.model_validate(place | {"val_images": limit, "batch_size": batch_size, "workers": WORKERS})
    device = torch.device("cpu") if isinstance(model, ExportedModel) else pick_device(device_name)
    source = open_images(data, data.val_split, model)
    if model.num_classes:
        require_labels(source, f"{data.root or data.dataset}")
    require_known_classes(model, source)
    images = batches(model, source, data, limit=limit)
    dtype = torch.float32 if isinstance(model, ExportedModel) else pick_dtype(dtype_name, device)
    result = Validation(images, device, dtype, progress).accuracy(model, "evaluating")
    return EvaluateReport(
        device=describe_device(device),
        model=model_name,
        dataset=f"{data.dataset} {root if data.val_split == ALL else data.val_split}",
        accuracy=result,
        available=images.available,
        skipped_images=len(images.skipped),
        notes=images.notes(skipped=[]),
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
    return {"dataset": dataset, "root": place, "val_split": split or remembered.get("split", "validation")}


def _is_place(root: Path, remembered: str | None) -> bool:
    return bool(remembered) and root.expanduser().resolve() == Path(str(remembered)).resolve()
