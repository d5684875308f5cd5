"""gradual: prune a little, recover, prune more, over the budgets of `schedule` -> RUN/gradual/, the last model and its curve.

Each step is a run of its own, of calibrate, prune and finetune-lora-ga, on the model that the step before has recovered, and is
kept until all are done: what was interrupted goes on where it was. The teacher stays the dense model.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from lpvit_cli.errors import UsageError
from lpvit_cli.files import replace_text
from lpvit_cli.models.build import build_model
from lpvit_cli.models.folder import as_dense, load_model, model_config, read_config
from lpvit_cli.pipeline.run import Run
from lpvit_cli.progress import Progress
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.section import note_reads
from lpvit_cli.report.pictures import gradual_picture
from lpvit_cli.report.schema import GradualReport, GradualStep
from lpvit_cli.sparse.masks import block_masks, require_nested
from lpvit_cli.stages import CALIBRATE, FINETUNE, GRADUAL, PRUNE, profile_path, run_of


def run_stage(recipe: Recipe, run: Run, work: Path, progress: Progress) -> GradualReport:
    if not recipe.schedule:
        raise UsageError("schedule: no budgets given", "for example: --set schedule=[0.3,0.5,0.7], of the kind of prune.budget")
    if recipe.finetune is None:
        raise UsageError("schedule: pruning by steps needs recovery between them", "give the recipe a finetune section")
    kept = run.progress_folder(GRADUAL)
    made: list[Run] = []
    for number, value in enumerate(recipe.schedule, start=1):
        folder = kept / f"{number}"
        before = made[-1].folder / FINETUNE.folder if made else None
        model = as_dense(before, kept / f"{number}.safetensors") if before else recipe.model
        made.append(run_of(recipe.step(model, value, profile_path(run)), folder))
        made[-1].origin = recipe.model
        _execute(made[-1], partial(_step_progress, progress, f"[{number}/{len(recipe.schedule)}, {value:g}]"))

    reports = [(step.report(PRUNE), step.report(FINETUNE)) for step in made]
    dense = {"quality_dense": reports[0][0].quality_dense}  # to a later step, the model recovered before it was the dense one
    steps = [
        GradualStep(
            budget=value,
            folder="." if step is made[-1] else f"{value:g}",
            pruned=pruned.model_copy(update=dense),
            recovered=recovered.model_copy(update=dense),
        )
        for value, step, (pruned, recovered) in zip(recipe.schedule, made, reports, strict=True)
    ]
    original, masks = build_model(recipe.model, recipe.task, recipe.features), []
    for step, ran in zip(steps, made, strict=True):
        source, target = ran.folder / FINETUNE.folder, work / step.folder
        target.mkdir(exist_ok=True)
        shutil.copyfile(source / "model.safetensors", target / "model.safetensors")
        config = read_config(source)
        described = model_config(recipe.model, original, parent=recipe.model.model_dump(mode="json"))
        described["preprocessing"] = {**config["preprocessing"], **described["preprocessing"]}  # label names are the step's
        replace_text(target / "config.json", json.dumps({**config, **described}, indent=1))
        masks.append(block_masks(load_model(target)))
    require_nested(masks)
    report = GradualReport(
        device=steps[-1].recovered.device,
        notes=[f"{step.budget:g}: {note}" for step in steps for note in (*step.pruned.notes, *step.recovered.notes)],
        kind=recipe.prune.budget.kind,
        steps=steps,
    )
    if find_spec("matplotlib"):
        replace_text(work / "gradual.svg", gradual_picture(report))
    return report


def _execute(step: Run, progress: Progress) -> None:
    with step.open():
        for stage in (CALIBRATE, PRUNE, FINETUNE):
            if step.changes(stage) != []:
                step.execute(stage, progress)
            elif record := step.record(stage):
                note_reads(record.reads)  # by the process that made it, for this stage


def _step_progress(progress: Progress, step: str, what: str, done: int, total: int, detail: str) -> None:
    progress(f"{step} {what}", done, total, detail)
