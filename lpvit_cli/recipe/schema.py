"""A recipe: one YAML file that says which model, which data, where it will run, and what every stage does.

`Recipe.load` reads a file (or the name of a shipped recipe), applies `--set` overrides, and either returns a frozen,
fully resolved recipe or raises a `UsageError` that names the file, the line, the key and the rule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator

from lpvit_cli.errors import printable
from lpvit_cli.recipe.data import CalibrateSection, DataSection
from lpvit_cli.recipe.errors import explain
from lpvit_cli.recipe.export import ExportSection
from lpvit_cli.recipe.finetune import FinetuneSection
from lpvit_cli.recipe.measure import OF_MERGING, SUBJECTS, BenchSection, ProfileSection, SubjectName
from lpvit_cli.recipe.model import FeaturesKind, ModelSection, TaskKind
from lpvit_cli.recipe.prune import Budget, PruneSection
from lpvit_cli.recipe.section import Section, flatten
from lpvit_cli.recipe.shipped import find_recipe
from lpvit_cli.recipe.source import apply_override, read_source
from lpvit_cli.recipe.target import PRECISIONS, Dtype, TargetSection
from lpvit_cli.recipe.tokens import TokensSection
from lpvit_cli.registry import BUDGETS


class Recipe(Section):
    """Everything a run does. Frozen; paths are absolute; every default is filled in."""

    name: Annotated[str, Field(pattern=r"^\.*[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200)]  # default: the file's; the run
    # folder is runs/NAME
    seed: int = Field(default=0, ge=0)  # of everything random, but for weights that nobody gave
    device: str = "auto"  # where lpvit works: auto, cpu, cuda, cuda:1
    dtype: Dtype = "auto"  # compute type of evaluation and recovery; auto: bfloat16 on GPUs, float32 on CPUs
    task: TaskKind = "auto"  # what the model is to stay as good at; auto: classification with a head, features without
    features: FeaturesKind = "pooled"  # of the features task: one embedding an image, or those of all tokens
    model: ModelSection  # what is pruned
    data: DataSection  # images to calibrate, recover and evaluate on
    target: TargetSection = TargetSection()  # where the model will run
    calibrate: CalibrateSection = CalibrateSection()  # `lpvit calibrate`
    tokens: TokensSection | None = None  # similar tokens are merged between blocks; null: none
    prune: PruneSection = PruneSection()  # `lpvit prune`
    sweep: tuple[float, ...] = ()  # budgets of `lpvit prune --sweep`, of the same kind as prune.budget
    schedule: tuple[float, ...] = ()  # budgets of `lpvit gradual`, of the same kind, each below the one before
    finetune: FinetuneSection | None = FinetuneSection()  # `lpvit finetune-lora-ga`; None: `lpvit run` leaves it out
    bench: BenchSection = BenchSection()  # `lpvit bench`
    profile: ProfileSection = ProfileSection()  # `lpvit profile`
    export: ExportSection = ExportSection()  # `lpvit export`

    @field_validator("sweep", "schedule")
    @classmethod
    def _holds_budgets(cls, budgets: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if budgets and (tokens := info.data.get("tokens")) and tokens.auto:
            raise ValueError("tokens: auto splits one budget, prune.budget; for several give tokens.flops")
        if "prune" in info.data:  # absent when it is invalid itself
            for value in budgets:
                Budget.model_validate({info.data["prune"].budget.kind: value})
        return budgets

    @field_validator("schedule")
    @classmethod
    def _prunes_more_and_more(cls, schedule: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if not schedule or "prune" not in info.data:
            return schedule
        prune: PruneSection = info.data["prune"]
        if prune.budget.is_searched or prune.patterns or len(prune.blocks) > 1:
            raise ValueError(
                "a schedule needs a budget other than max_drop, one block shape, and no patterns: they may bring back blocks"
            )
        downwards = tuple(sorted(set(schedule), reverse=BUDGETS.get(prune.budget.kind).larger_keeps_more))
        if schedule != downwards:
            raise ValueError(f"each {prune.budget.kind} must leave less than the one before: {list(downwards)}")
        return schedule

    @field_validator("prune")
    @classmethod
    def _can_split(cls, prune: PruneSection, info: ValidationInfo) -> PruneSection:
        tokens = info.data.get("tokens")
        if tokens and tokens.auto and (prune.budget.kind not in ("flops", "latency_ms") or prune.method != "obs"):
            raise ValueError("tokens: auto splits a budget of flops or latency_ms, with method: obs; or give tokens.flops")
        return prune

    def model_post_init(self, context: Any) -> None:
        self.place()

    @classmethod
    def load(cls, path_or_name: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
        """Read a recipe file, or a shipped recipe by name, with `a.b=value` overrides (values are YAML).

        Raises UsageError naming file, line, key, rule, and the nearest valid key.
        """
        path = find_recipe(path_or_name)
        content, origin = read_source(path)
        content.setdefault("name", path.stem)
        for override in overrides:
            key = apply_override(content, override)
            origin = {k: v for k, v in origin.items() if k[: len(key)] != key}
            origin[key] = f"--set {printable(override, 200)}"
        try:
            return cls.model_validate(content, context={"folder": path.parent})
        except ValidationError as error:
            raise explain(error, cls, content, origin, path) from None

    # what the target's section means where

    @property
    def target_device(self) -> str:
        """The name of the device that the model will run on."""
        return str(self.device if self.target.device == "auto" else self.target.device)

    @property
    def target_dtypes(self) -> tuple[str, ...]:
        """The compute types that bench measures; profile and sweep take the first."""
        if self.bench.dtypes:
            return self.bench.dtypes
        precision = self.target.precision
        return (self.dtype if precision == "auto" else "float32" if precision.startswith("int8") else precision,)

    @property
    def file_precision(self) -> str:
        """What exported files are written in."""
        asked: str | None = self.export.precision
        if asked is None:
            asked = self.target.precision if self.target.runtime != "torch" else "float32"
        return asked if asked in PRECISIONS else "float32"

    @property
    def splits(self) -> bool:
        """Whether merging is chosen for the budget."""
        return self.tokens is not None and self.tokens.auto

    @property
    def subjects(self) -> tuple[SubjectName, ...]:
        """What bench compares."""
        merging = OF_MERGING if self.tokens and self.target.runtime == "torch" else ()
        return self.bench.subjects or (*SUBJECTS.get(self.target.runtime, SUBJECTS["torch"]), *merging)

    # other forms

    def smoke(self, architecture: str, kwargs: dict[str, Any]) -> Recipe:
        """The same recipe made small: a randomly initialised model, generated images, one epoch.

        `architecture` and `kwargs` are the small model's (see models.build.shrink).
        """
        small: dict[str, Any] = self.model_dump()
        small["name"] += "-smoke"
        small["model"] |= {"name": architecture, "pretrained": False, "weights": None, "kwargs": kwargs, "label_names": None}
        small["data"] |= {"dataset": "synthetic", "root": None, "class_map": None}
        small["data"] |= {"batch_size": 16, "workers": 0, "val_images": 32}
        small["target"]["batch_size"] = 2
        small["calibrate"] |= {"images": 32, "batch_size": 8}
        if self.tokens and not self.splits:  # two blocks cannot merge what twelve can
            small["tokens"] = {"fraction": 0.2}
        small["prune"]["reweigh"] = min(1, self.prune.reweigh)
        small["bench"] |= {"batch_sizes": (2,), "rounds": 6, "warmup_seconds": 0.2}
        small["bench"]["energy"] |= {"window_seconds": 2.0, "trials": 6}
        small["profile"] |= {"rounds": 6}
        small["schedule"] = self.schedule[-2:]
        if self.finetune:
            small["finetune"] |= {"epochs": 1, "init_batches": 1, "rank": 4, "warmup_epochs": 0}
        return Recipe.model_validate(small)

    def step(self, model: ModelSection, value: float, profile: Path | None) -> Recipe:
        """The recipe of one step of the schedule: another model and budget, the dense model as teacher; features are sorted in
        the first only."""
        assert self.finetune is not None
        finetune = self.finetune
        if distill := finetune.distill:
            taught = distill.model_copy(update={"teacher": distill.teacher or self.model})
            finetune = finetune.model_copy(update={"distill": taught})
        sorts = self.prune.reorder and model == self.model
        budget = Budget.model_validate({self.prune.budget.kind: value})
        prune = self.prune.model_copy(update={"budget": budget, "profile": profile, "reorder": sorts})
        changes = {"model": model, "prune": prune, "finetune": finetune, "schedule": (), "sweep": ()}
        return Recipe.model_validate(self.model_copy(update=changes).plain())

    def flat(self) -> dict[str, Any]:
        """Dotted keys to plain values, as stage records and messages have them; nothing counts as read."""
        return flatten(self.plain())

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.plain(), sort_keys=False)
