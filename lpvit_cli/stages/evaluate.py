"""evaluate: accuracy of a model on the validation images; every stage that changes a model calls it too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lpvit_cli.data import Batches, batches, class_names, open_images
from lpvit_cli.errors import UsageError
from lpvit_cli.export.openvino import OpenVinoModel
from lpvit_cli.export.program import TorchProgram
from lpvit_cli.export.runtime import ExportedModel, OnnxModel
from lpvit_cli.measure.accuracy import Accuracy, accuracy
from lpvit_cli.models import (
    VisionModel,
    autocast,
    build_model,
    describe_device,
    load_model,
    pick_device,
    pick_dtype,
    read_config,
)
from lpvit_cli.recipe import DataSection, ModelSection, Recipe
from lpvit_cli.report.schema import EvaluateReport
from lpvit_cli.run import Progress
from lpvit_cli.stages import FINETUNE, GRADUAL, PRUNE

EXPORTED: dict[str, Callable[[Path], ExportedModel]] = {
    ".onnx": OnnxModel,
    ".pt2": TorchProgram,
    ".xml": OpenVinoModel,
}


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
    place = {
        "dataset": dataset or remembered.get("dataset"),
        "root": root or (remembered.get("root") if dataset in (None, remembered.get("dataset")) else None) or None,
        "val_split": split or remembered.get("split", "validation"),
    }
    if place["dataset"] is None:
        raise UsageError(f"{model_name}: which images?", "pass --dataset folder --root /path/to/imagenet")
    data = DataSection.model_validate(place | {"val_images": limit, "batch_size": batch_size, "workers": 0})
    device = torch.device("cpu") if isinstance(model, ExportedModel) else pick_device(device_name)
    source = open_images(data, data.val_split, model)
    require_known_classes(model, source)
    validation = batches(model, source, data, limit=limit)
    dtype = torch.float32 if isinstance(model, ExportedModel) else pick_dtype(dtype_name, device)
    result = measure_accuracy(model, validation, device, dtype, progress, "evaluating")
    return EvaluateReport(
        device=describe_device(device),
        model=model_name,
        dataset=f"{data.dataset} {data.val_split}",
        accuracy=result,
        skipped_images=len(validation.skipped),
    )


def open_model(name: str) -> tuple[VisionModel, dict[str, str]]:
    """A model folder, a run folder (its latest model), a file that export wrote, or a timm name; with its data section."""
    path = Path(name)
    if not (path / "config.json").is_file():  # what export wrote, if it is that
        path = next((file for suffix in EXPORTED for file in sorted(path.glob(f"model*{suffix}"))), path)
    if path.is_file():
        if path.suffix not in EXPORTED:
            raise UsageError(
                f"{path}: not a model lpvit can run",
                "give a model folder, a .onnx, .pt2 or .xml file written by lpvit, or a timm name",
            )
        exported = EXPORTED[path.suffix](path)
        return exported, exported.config.get("data", {})
    if path.is_dir():
        if not (path / "config.json").is_file():
            latest = (path / GRADUAL.folder, path / FINETUNE.folder, path / PRUNE.folder)
            path = next((folder for folder in latest if (folder / "config.json").is_file()), path)
        return load_model(path), read_config(path).get("data", {})
    if path.suffix in EXPORTED or (len(path.parts) > 1 and not name.startswith("hf-hub:")):
        raise UsageError(
            f"{name}: no such model folder or file", "runs/NAME/pruned, runs/NAME/export/model.onnx, or a timm name"
        )
    return build_model(ModelSection(name=name, pretrained=True)), {}


def require_known_classes(model: VisionModel, source: object) -> None:
    """Labels are positions in the sorted class names: other names would silently mean other classes."""
    known, given = model.pretrained_cfg.get("label_names"), class_names(source)
    if known and given and list(known) != list(given):
        odd = sorted(set(known) ^ set(given))[:3]
        raise UsageError(
            f"data: the images have other classes than the model (for example {', '.join(odd)})", "use its own data set"
        )


def validation_batches(recipe: Recipe, model: VisionModel) -> Batches:
    source = open_images(recipe.data, recipe.data.val_split, model)
    return batches(model, source, recipe.data, limit=recipe.data.val_images)


def evaluate_model(
    model: nn.Module, validation: Batches, recipe: Recipe, device: torch.device, progress: Progress, what: str
) -> Accuracy:
    """Accuracy of `model` (moved to `device`) on the validation images, in the recipe's compute type."""
    return measure_accuracy(model, validation, device, pick_dtype(recipe.dtype, device), progress, what)


def measure_accuracy(
    model: nn.Module, validation: Batches, device: torch.device, dtype: torch.dtype, progress: Progress, what: str
) -> Accuracy:
    model.eval().to(device)
    total = validation.share
    with torch.inference_mode(), autocast(device, dtype):
        return accuracy(
            lambda x: model(x.to(device)), validation, lambda done: progress(what, done, total, f"{done}/{total} images")
        )
