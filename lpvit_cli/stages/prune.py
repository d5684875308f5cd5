"""prune: curves, allocation, masks, compensated weights -> RUN/pruned/, a model folder with packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lpvit_cli import distributed
from lpvit_cli.curvature import load_statistics
from lpvit_cli.data.readers import class_names
from lpvit_cli.devices import describe_device, pick_dtype
from lpvit_cli.models.build import build_model
from lpvit_cli.models.folder import model_config, save_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.merging import merge_tokens, tokens_of_blocks
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.pipeline.run import Run
from lpvit_cli.progress import Progress
from lpvit_cli.pruning.engine import prune_models
from lpvit_cli.pruning.plan import Allocation, Plan
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.prune import Budget
from lpvit_cli.registry import BUDGETS
from lpvit_cli.report.layers import layer_reports
from lpvit_cli.report.schema import MergedReport, PruneReport
from lpvit_cli.stages import CALIBRATE
from lpvit_cli.stages.calibrate import STATISTICS, planner
from lpvit_cli.tasks.evaluation import Validation, validation_of
from lpvit_cli.tokens.blocks import merging_of, unmerged


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> PruneReport:
    return make_plan(recipe, run, progress).prune_each([(recipe.prune.budget, work)])[0]


@dataclass
class Pruner:
    """A plan, the recipe it is of, and the images its models are judged on."""

    recipe: Recipe
    plan: Plan
    model: VisionModel  # dense; that of the plan merges tokens where the recipe says so
    validation: Validation
    progress: Progress

    def points(self, model: nn.Module, what: str) -> float:
        """The points of the task, for searches; of the dense model they are measured once."""
        quality = self.dense if model in (self.model, self.plan.model) else self._quality(model, what, neighbours=False)
        return float(quality.score[0])

    @cached_property
    def dense(self) -> Any:
        """The quality of the dense model."""
        return self._quality(self.model, "evaluating the dense model")

    @cached_property
    def _merged_quality(self) -> Any:
        return self._quality(self.plan.model, "evaluating the model with merged tokens", neighbours=False)

    def _quality(self, model: nn.Module, what: str, neighbours: bool = True) -> Any:
        quality = self.validation.quality(model, what, neighbours)
        model.cpu()
        return quality

    def _merged(self, pruned: nn.Module) -> MergedReport | None:
        """What merging tokens alone makes of the model, and pruning alone."""
        model = self.plan.model
        if (merging := merging_of(model)) is None:
            return None
        return MergedReport(
            merging=merging,
            tokens=tokens_of_blocks(model),
            flops=self.plan.flops.total,
            quality=self._merged_quality,
            quality_unmerged=self._quality(unmerged(pruned), "evaluating the pruned model without merging", neighbours=False),
        )

    def prune_each(self, wanted: Sequence[tuple[Budget, Path]]) -> list[PruneReport]:
        """Prune to several budgets, evaluate, and write a model folder for each; what they share is made once."""
        settled = [
            BUDGETS.get(one.kind).settle(self.plan, one.value, self.points, self.progress) if one.is_searched else one
            for one, _ in wanted
        ]
        made = prune_models(self.plan, settled, self.progress)
        return [self._written(*pruned, work) for pruned, (_, work) in zip(made, wanted, strict=True)]

    def _written(self, model: nn.Module, allocation: Allocation, work: Path) -> PruneReport:
        recipe, plan, dense = self.recipe, self.plan, self.dense
        quality = self._quality(model, "evaluating the pruned model")
        facts = {"data": recipe.data.remembered(), "parent": recipe.model.model_dump(mode="json")}
        save_model(work, model, model_config(recipe.model, self.model, **facts))
        predicted = allocation.plan.predict(allocation)
        return PruneReport(
            device=describe_device(plan.device),
            skipped_images=len(skipped := distributed.all_gather(self.validation.images.skipped)),
            notes=[*self.validation.images.notes(skipped), *allocation.notes()],
            method=recipe.prune.method,
            beta=allocation.beta,
            layers=layer_reports(allocation),
            merged=self._merged(model),
            flops_dense=plan.flops_dense,
            flops=predicted.flops,
            energy_uj_dense=plan.energy_uj_dense,
            linear_kept_fraction=predicted.kept_fraction,
            bytes_dense=plan.bytes_dense,
            bytes=sum(path.stat().st_size for path in work.iterdir()),
            latency_ms_dense=plan.latency_ms_dense,
            latency_ms=predicted.latency_ms,
            quality_dense=dense,
            quality=quality,
        )


def make_plan(recipe: Recipe, run: Run, progress: Progress) -> Pruner:
    """The plan of a run, from its calibration."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, recipe.task, recipe.features)
    merged = merge_tokens(model, run.report(CALIBRATE).merging)
    statistics = load_statistics(run.artefact(CALIBRATE) / STATISTICS, prunable_layers(merged, recipe.prune.layers))
    plan = planner(recipe, run, model, statistics, progress)(merged)
    dense = build_model(run.origin, recipe.task, recipe.features) if run.origin else model
    validation = validation_of(
        recipe.data, recipe.calibrate, model, dense, run.device, pick_dtype(recipe.dtype, run.device), progress
    )
    known = {"label_names": model.num_classes and class_names(validation.images.source), "exif": recipe.data.exif}
    model.pretrained_cfg |= {key: value for key, value in known.items() if value}
    return Pruner(recipe, plan, model, validation, progress)
