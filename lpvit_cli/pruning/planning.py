"""A plan from the images that a recipe names and the statistics of its calibration."""

from __future__ import annotations

import torch

from lpvit_cli.curvature import LayerStatistics
from lpvit_cli.data.splits import calibration_batches, held_back_batches
from lpvit_cli.measure.profile import DeviceProfile
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.progress import Progress
from lpvit_cli.pruning.plan import Plan, build_plan
from lpvit_cli.recipe.data import CalibrateSection, DataSection
from lpvit_cli.recipe.prune import PruneSection
from lpvit_cli.tasks.evaluation import gradient_for, task_of


def plan_of(
    model: VisionModel,
    prune: PruneSection,
    data: DataSection,
    calibrate: CalibrateSection,
    seed: int,
    *,
    dense: VisionModel,
    statistics: dict[str, LayerStatistics],
    device: torch.device,
    dtype: torch.dtype,
    profile: DeviceProfile | None,
    progress: Progress,
) -> Plan:
    """The plan of `model`, which is `dense` or a copy of it that merges tokens. As `build_plan`."""
    task, calibration = task_of(model), calibration_batches(data, calibrate, seed, model)
    return build_plan(
        prune,
        model,
        prunable_layers(model, prune.layers),
        statistics,
        calibration,
        example=torch.empty(1, *model.pretrained_cfg["input_size"]),
        task=task,
        gradient=gradient_for(task, calibrate, calibration),
        seed=seed,
        device=device,
        progress=progress,
        dtype=dtype,
        profile=profile,
        held_back=held_back_batches(data, calibrate, seed, model),
        reference=None if model is dense else dense,
    )
