"""The stages of a run: what each is called, what it writes, and whose artefacts it reads.

Light on purpose (no torch): the command line and resuming need the list, the work itself is imported when it starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpvit_cli.files import content_id, digest
from lpvit_cli.machine import installed
from lpvit_cli.pipeline.stage import Stage

if TYPE_CHECKING:
    from lpvit_cli.pipeline.run import Run
    from lpvit_cli.recipe import Recipe

# what stages read besides recipe keys; of recipe keys that they read, lpvit_cli/recipe/section.py keeps account


def own_profile(run: Run) -> tuple[Stage, ...]:
    """The profile of this run, where the budget needs one and the recipe names none."""
    prune = run.recipe.prune
    return (PROFILE,) if prune.profile is None and prune.budget.needs_profile else ()


def profile_path(run: Run) -> Path | None:
    """The device profile that pruning reads: the one the recipe names, or this run's where the budget needs one."""
    from lpvit_cli.recipe.source import is_profile_name

    given = run.recipe.prune.profile
    if given is not None and is_profile_name(str(given)):
        from lpvit_cli.measure.profile import named_profile

        return named_profile(str(given))
    return run.folder / PROFILE.folder / "profile.json" if own_profile(run) else given


def profile_of(run: Run) -> Any:
    """What pruning reads of it; None: no budget or recipe asks for one."""
    from lpvit_cli.measure.profile import DeviceProfile

    path = profile_path(run)
    return DeviceProfile.load(path, needs_energy=run.recipe.prune.budget.kind == "energy_mj") if path else None


def _profile_content(run: Run) -> dict[str, Any]:
    path = profile_path(run)
    return {"prune.profile (content)": content_id(path)} if path else {}


def _recovered(run: Run) -> Stage:
    """Whose model bench and export take: the recovered one when there is one."""
    if run.recipe.schedule:
        return GRADUAL
    recovered = run.recipe.finetune is not None and run.record(FINETUNE) is not None
    return FINETUNE if recovered else PRUNE


def _order_of_ranks(run: Run) -> dict[str, Any]:
    rank = run.recipe.finetune and run.recipe.finetune.rank
    return {"finetune.rank (order)": list(rank)} if isinstance(rank, dict) else {}  # the first glob that matches counts


def _benched(run: Run) -> dict[str, Any]:
    """What bench measures beside this run's model. Exports that tell its numbers depend on it in turn: not on that."""
    inputs: dict[str, Any] = {}
    if any("onnx" in name for name in run.recipe.subjects):
        inputs["versions.onnxruntime"] = installed("onnxruntime")
    if "onnx" in run.recipe.subjects and (exported := run.record(EXPORT)):
        inputs["export"] = digest({key: value for key, value in exported.inputs.items() if key != "measured by bench"})
    if baseline := run.recipe.bench.baseline:
        files = [baseline, *sorted(baseline.glob("**/model.safetensors"))]
        inputs["bench.baseline (content)"] = digest([content_id(path) for path in files if path.is_file()])
    return inputs


def _exported(run: Run) -> dict[str, Any]:
    inputs = {"versions.onnxruntime": installed("onnxruntime")}
    if "hub" in run.recipe.export.formats and (bench := run.record(BENCH)):
        inputs["measured by bench"] = bench.fingerprint  # the model card tells its numbers
    return inputs


def _stage(command: str, folder: str, report: str, summary: str, **more: Any) -> Stage:
    name = {"finetune-lora-ga": "finetune"}.get(command, command)
    return Stage(command, folder, f"lpvit_cli.stages.{name}", f"lpvit_cli.report.schema:{report}", summary, **more)


CALIBRATE = _stage(
    "calibrate",
    "calibration",
    "CalibrateReport",
    "Gather statistics of the dense model on calibration images.",
    together=True,
    sources=lambda run: own_profile(run) if run.recipe.splits else (),
    inputs=lambda run: _profile_content(run) if run.recipe.splits else {},
)
PRUNE = _stage(
    "prune",
    "pruned",
    "PruneReport",
    "Choose the blocks to remove under the budget and write the block-sparse model.",
    upstream=lambda run: CALIBRATE,
    sources=own_profile,
    inputs=_profile_content,
    together=True,
)
SWEEP = _stage(
    "sweep",
    "sweep",
    "SweepReport",
    "Prune to several budgets from one calibration.",
    usage="prune {recipe} --sweep BUDGETS",
    upstream=lambda run: CALIBRATE,
    sources=own_profile,
    inputs=_profile_content,
    timed=True,
)
FINETUNE = _stage(
    "finetune-lora-ga",
    "finetuned",
    "FinetuneReport",
    "Recover accuracy with LoRA-GA; every zero block stays zero.",
    upstream=lambda run: PRUNE,
    inputs=_order_of_ranks,
    together=True,
)
BENCH = _stage(
    "bench",
    "bench",
    "BenchReport",
    "Measure latency, memory and energy of the pruned model against dense ones; --compare checks two reports.",
    upstream=_recovered,
    inputs=_benched,
    timed=True,
)
EXPORT = _stage(
    "export",
    "export",
    "ExportReport",
    "Write files that run without lpvit, faster than dense ones, checked on real images.",
    upstream=_recovered,
    inputs=_exported,
    timed=True,
)
PROFILE = _stage(
    "profile",
    "profile",
    "ProfileReport",
    "Measure what each layer takes on the target, by the fraction of its blocks kept.",
    timed=True,
)
GRADUAL = _stage(
    "gradual",
    "gradual",
    "GradualReport",
    "Prune and recover in turns, over the budgets of the recipe's schedule.",
    sources=own_profile,
    inputs=lambda run: _profile_content(run) | _order_of_ranks(run),
)
STAGES = (CALIBRATE, PRUNE, FINETUNE, BENCH, EXPORT)  # what `lpvit run` runs
ALL_STAGES = (*STAGES, SWEEP, GRADUAL, PROFILE)


def run_of(recipe: Recipe, folder: Path, asked: str = "") -> Run:
    """The run of a recipe in a folder; `asked`: how the user calls the recipe."""
    from lpvit_cli.pipeline.run import Run

    return Run(recipe, folder, ALL_STAGES, asked)


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """What `lpvit run` runs, in order."""
    stages = STAGES if recipe.finetune else tuple(stage for stage in STAGES if stage is not FINETUNE)
    if recipe.schedule:
        stages = (GRADUAL, *(stage for stage in stages if stage not in (CALIBRATE, PRUNE, FINETUNE)))
    if recipe.prune.profile is None and recipe.prune.budget.needs_profile:
        stages = (PROFILE, *stages)
    return in_order(stages, recipe)


def in_order(stages: tuple[Stage, ...], recipe: Recipe) -> tuple[Stage, ...]:
    """bench after export where it measures the file that export writes."""
    return tuple(sorted(stages, key=lambda stage: stage is BENCH)) if "onnx" in recipe.subjects else stages


def made_by(run: Run, stage: Stage) -> tuple[Any, Any | None]:
    """The reports of how the model of bench or export was pruned, and recovered if it was."""
    source = run.upstream(stage)
    if source is GRADUAL:
        last = run.report(GRADUAL).steps[-1]
        return last.pruned, last.recovered
    return run.report(PRUNE), run.report(FINETUNE) if source is FINETUNE else None
