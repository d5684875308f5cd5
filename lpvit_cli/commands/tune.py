"""tune: time every way to run each block-sparse layer on this device, dense included, and remember the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lpvit_kernels.dispatch import KINDS

from lpvit_cli.devices import describe_device, pick_device, pick_dtype, type_name
from lpvit_cli.errors import UsageError
from lpvit_cli.export.opening import open_model
from lpvit_cli.measure.timing import cpu_threads
from lpvit_cli.progress import Progress
from lpvit_cli.recipe import Recipe
from lpvit_cli.report.schema import TuneReport
from lpvit_cli.sparse import sparse_layers
from lpvit_cli.targets.base import ExportedModel
from lpvit_cli.targets.tuning import tune_model

BATCH_SIZES = (1, 16, 256)


def tune_any(
    model_name: str,
    batch_sizes: Sequence[int] | None,
    training: bool,
    threads: int | None,
    device_name: str | None,
    dtype_name: str | None,
    progress: Progress,
) -> TuneReport:
    """Tune a model folder or run folder; what is None is that of the run's recipe. Raises UsageError where nothing in it is
    block-sparse."""
    model, _ = open_model(model_name)
    if isinstance(model, ExportedModel):
        raise UsageError(f"{model_name}: a file is run as it is, there is nothing to tune", "give a model folder")
    if not sparse_layers(model):
        raise UsageError(f"{model_name}: no layer is block-sparse", "give a pruned model: lpvit prune RECIPE")
    recipe = _recipe_of(Path(model_name))
    device = pick_device(device_name or (recipe.target_device if recipe else "auto"))
    dtype = pick_dtype(dtype_name or (recipe.target_dtypes[0] if recipe else "auto"), device)
    sizes = batch_sizes or (_batch_sizes(recipe) if recipe else BATCH_SIZES)
    with cpu_threads(threads or (recipe.target.threads if recipe else None)):
        tuned = tune_model(model.to(device, dtype), sizes, KINDS if training else ("forward",), progress)
        return TuneReport(
            device=describe_device(device),
            model=model_name,
            dtype=type_name(dtype),
            threads=torch.get_num_threads() if device.type == "cpu" else None,
            tuned=tuned,
        )


def _recipe_of(folder: Path) -> Recipe | None:
    """The recipe of a run, for its own folder or that of one of its models."""
    file = next((path for path in (folder / "recipe.yaml", folder.parent / "recipe.yaml") if path.is_file()), None)
    if file is None or not folder.is_dir():
        return None
    try:
        return Recipe.load(file)
    except UsageError:
        return None  # of another lpvit, or none of its recipes


def _batch_sizes(recipe: Recipe) -> Sequence[int]:
    return sorted({recipe.target.batch_size, *recipe.bench.batch_sizes})
