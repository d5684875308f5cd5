"""The stages of a run, one command each, and `run` for all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lpvit_cli import distributed
from lpvit_cli.cli.common import BenchOrder, Order, app, command
from lpvit_cli.cli.console import Console
from lpvit_cli.errors import CheckFailed, EnvironmentFault, UsageError
from lpvit_cli.pipeline.stage import Stage
from lpvit_cli.registry import FORMATS
from lpvit_cli.stages import (
    ALL_STAGES,
    BENCH,
    CALIBRATE,
    EXPORT,
    FINETUNE,
    GRADUAL,
    PROFILE,
    PRUNE,
    SWEEP,
    in_order,
    run_of,
    stages_of,
)

if TYPE_CHECKING:
    from lpvit_cli.pipeline.run import Run
    from lpvit_cli.recipe import Recipe

Reports = dict[str, Any]  # by the command of the stage
TARGET_DTYPE, TARGET_BATCH = "target.precision={}", "target.batch_size={}"


@command(app, "run", "All stages in order, skipping what is up to date.")
def run_all(console: Console, order: Order) -> None:
    recipe = load(order, "run", order.overrides())
    stages = stages_of(recipe)
    run = run_of(recipe, order.output or Path("runs") / recipe.name, order.recipe)
    if reports := carry_out(console, order, run, stages):
        from lpvit_cli.report.terminal.run import summary

        console.human(summary(recipe.name, reports, run.folder))
        console.document = documents(reports)


@command(app, CALIBRATE.command, CALIBRATE.summary)
def calibrate(console: Console, order: Order) -> None:
    one_stage(console, order, CALIBRATE, order.overrides(batch_size="calibrate.batch_size={}"))


@command(app, PRUNE.command, PRUNE.summary)
def prune(
    console: Console,
    order: Order,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep",
            metavar="BUDGETS",
            help="Prune to each of these budgets instead, for example 0.3,0.5,0.7 (of the kind of prune.budget).",
        ),
    ] = None,
) -> None:
    overrides = order.overrides()
    if sweep is None:
        one_stage(console, order, PRUNE, overrides)
    else:
        one_stage(console, order, SWEEP, [*overrides, f"sweep=[{sweep}]"], name=PRUNE.command)


@command(app, FINETUNE.command, FINETUNE.summary)
def finetune(console: Console, order: Order) -> None:
    one_stage(console, order, FINETUNE, order.overrides())


@command(app, GRADUAL.command, GRADUAL.summary)
def gradual(console: Console, order: Order) -> None:
    one_stage(console, order, GRADUAL, order.overrides())


@command(app, BENCH.command, BENCH.summary)
def bench(
    console: Console,
    order: BenchOrder,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="MODEL", help="Another run folder, model folder or ONNX file: all ratios are against it."
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Time every linear layer within the model.")] = False,
    require_energy: Annotated[bool, typer.Option("--require-energy", help="Exit 3 where no meter gave energy.")] = False,
    allow_mig: Annotated[bool, typer.Option("--allow-mig", help="Measure energy on a GPU split by MIG too.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--compare",
            metavar="A B",
            help="Instead of measuring: exit 4 when B is slower or uses more energy than A, reports or run folders.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare reports of different devices or settings.")] = False,
) -> None:
    if compare is not None:
        if order.recipe:
            raise UsageError(f"--compare reads two reports, and no recipe: {order.recipe!r}", "leave one of the two out")
        _compare(console, *compare, force)
        return
    if force:
        raise UsageError("--force is for --compare", "run: lpvit bench --compare A B --force")
    overrides = order.overrides(dtype=TARGET_DTYPE, batch_size="bench.batch_sizes=[{}]")
    overrides += ["bench.dtypes=[]"] * (order.dtype is not None)
    overrides += [f"bench.baseline={json.dumps(baseline)}"] * (baseline is not None)
    overrides += ["bench.layers=true"] * layers
    overrides += ["bench.energy.required=true"] * require_energy
    overrides += ["bench.energy.allow_mig=true"] * allow_mig
    one_stage(console, order, BENCH, overrides, instead="lpvit bench --compare A B")


@command(app, EXPORT.command, EXPORT.summary)
def export(
    console: Console,
    order: Order,
    format_: Annotated[
        list[str] | None,
        typer.Option("--format", metavar="FORMAT", help=f"{', '.join(FORMATS.names())}; repeatable (default: onnx)."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            "--push",
            metavar="OWNER/NAME",
            help="Upload the export (format hub) to this Hugging Face repository, made private where there is none.",
        ),
    ] = None,
) -> None:
    precision = "export.precision=null" if order.dtype == "auto" else "export.precision={}"
    overrides = order.overrides(dtype=precision, batch_size=TARGET_BATCH)
    overrides += [f"export.formats=[{','.join(format_)}]"] if format_ else []
    if push is None:
        one_stage(console, order, EXPORT, overrides)
        return
    if order.smoke:
        raise UsageError("--push: a rehearsal (--smoke) has a random model", "leave one of the two out")
    recipe = _with_hub(load(order, EXPORT.command, overrides), push)
    run = run_of(recipe, order.output or Path("runs") / recipe.name, order.recipe)
    if reports := carry_out(console, order, run, (EXPORT,), also={"push": f"to {push}"}):
        address = _push(console, run.folder / EXPORT.folder, push)
        console.document = documents(reports)[EXPORT.command] | {"pushed": address}


@command(app, PROFILE.command, PROFILE.summary)
def profile(
    console: Console,
    order: Order,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="NAME", help="Save the profile under this name for all recipes: --set prune.profile=NAME."
        ),
    ] = None,
    fit: Annotated[
        list[Path] | None,
        typer.Option(
            "--fit",
            metavar="RUN",
            help="Save it with the power model of these run folders, benched at several sparsities; repeatable.",
        ),
    ] = None,
) -> None:
    overrides = order.overrides(dtype=TARGET_DTYPE, batch_size=TARGET_BATCH)
    overrides += ["bench.dtypes=[]"] * (order.dtype is not None)
    if name is None and not fit:
        one_stage(console, order, PROFILE, overrides)
        return
    name = _savable_name(name, fit or [], order.smoke)
    recipe = load(order, PROFILE.command, overrides)
    run = run_of(recipe, order.output or Path("runs") / recipe.name, order.recipe)
    if reports := carry_out(console, order, run, (PROFILE,)):
        saved = _save_profile(console, reports[PROFILE.command].profile, name, fit or [])
        console.document = documents(reports)[PROFILE.command] | {"saved": saved}


# what the commands above share


def one_stage(
    console: Console, order: Order, stage: Stage, overrides: list[str], name: str | None = None, instead: str = ""
) -> None:
    recipe = load(order, name or stage.command, overrides, instead)
    run = run_of(recipe, order.output or Path("runs") / recipe.name, order.recipe)
    if reports := carry_out(console, order, run, (stage,)):
        console.document = documents(reports)[stage.command]


def load(order: Order, name: str, overrides: list[str], instead: str = "") -> Recipe:
    """The recipe that was asked for; small for a rehearsal."""
    from lpvit_cli.recipe import Recipe

    if not order.recipe:
        raise UsageError(f"{name}: which recipe?", f"run: lpvit {name} RECIPE, or: {instead}")
    recipe = Recipe.load(order.recipe, overrides)
    if order.smoke:
        from lpvit_cli.models.build import shrink

        recipe = recipe.smoke(*shrink(recipe.model))
    return recipe


def carry_out(
    console: Console, order: Order, run: Run, stages: tuple[Stage, ...], also: dict[str, str] | None = None
) -> Reports:
    """Run stages, skipping what is up to date; their reports, or none of a dry run. `also`: more of a dry run's plan."""
    stages = in_order(stages, run.recipe)
    if order.dry_run:
        _plan(console, order, run, stages, also or {})
        return {}
    _require_together(stages)
    reports: Reports = {}
    with distributed.joined(_on_gpus(run), console.give_up), run.open(order.overwrite):
        for number, stage in enumerate(stages, start=1):
            position = f"[{number}/{len(stages)}] " if len(stages) > 1 else ""
            reports[stage.command] = _bring_up_to_date(console, order, run, stage, position)
    return reports


def _bring_up_to_date(console: Console, order: Order, run: Run, stage: Stage, position: str) -> Any:
    from lpvit_cli.report.terminal import render

    changes, folder = distributed.on_main(lambda: run.changes(stage)), run.folder / stage.folder
    if order.resume and changes == []:
        report = run.report(stage)
        console.note(f"{position}{stage.command}: up to date, skipped ({folder})")
        shown = [] if position else render(report, folder)
    else:
        console.note(f"{position}{stage.command}" + (f" again ({changes[0]})" if changes else ""))
        report = run.execute(stage, console.progress, order.resume)
        shown = [*render(report, folder), *([""] if position else [])]
    console.human(*shown)
    if stage is BENCH and run.recipe.bench.energy.required and report.energy_reasons:
        raise EnvironmentFault(
            f"energy was not measured: {report.energy_reasons[0]}", f"see lpvit doctor; the times are kept in {folder}"
        )
    return report


def documents(reports: Reports) -> dict[str, Any]:
    return {name: report.model_dump(mode="json") for name, report in reports.items()}


def _plan(console: Console, order: Order, run: Run, stages: tuple[Stage, ...], also: dict[str, str]) -> None:
    """What a dry run prints."""
    from lpvit_cli.report.terminal import render

    plan: dict[str, str] = {}
    first: list[Stage] = []  # what will have run
    for stage in stages:
        what = _what_happens(run.changes(stage), order.resume)
        before = [*run.sources(stage), *([FINETUNE] if stage in (BENCH, EXPORT) else [])]
        if what == "up to date" and (again := next((one for one in first if one in before), None)):
            what = f"runs again ({again.command} runs first)"
        if what != "up to date":
            first.append(stage)
        plan[stage.command] = what
    plan |= also
    console.document = {"recipe": run.recipe.plain(), "output": str(run.folder), "stages": plan}
    lines = (f"# {stage}: {what}" for stage, what in plan.items())
    console.human(run.recipe.to_yaml(), f"# output: {run.folder}", *lines)
    if PRUNE in stages or SWEEP in stages:
        from lpvit_cli.commands.predict_pruning import predict

        prediction = predict(run.recipe, run, console.progress)
        console.document["prediction"] = prediction.model_dump(mode="json")
        console.human("", *render(prediction, run.folder))


def _what_happens(changes: list[str] | None, resume: bool) -> str:
    if changes is None:
        return "runs"
    if changes:
        return f"runs again ({changes[0]})"
    return "up to date" if resume else "runs again (--no-resume)"


def _require_together(stages: tuple[Stage, ...]) -> None:
    alone = next((stage for stage in stages if not stage.together), None)
    if distributed.world() > 1 and alone:
        together = ", ".join(stage.command for stage in ALL_STAGES if stage.together)
        raise UsageError(
            f"{alone.command} runs in one process, not under torchrun", f"torchrun takes {together}; run the others without it"
        )


def _on_gpus(run: Run) -> bool:
    """Whether the processes of this job, if there are several, work on GPUs, each on its own."""
    if distributed.world() == 1:
        return False
    import torch

    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    return run.device.type == "cuda"


def _compare(console: Console, before: Path, after: Path, force: bool) -> None:
    from lpvit_cli.commands.compare import compare
    from lpvit_cli.report.terminal import render

    report = compare(before, after, force)
    console.document = report.model_dump(mode="json")
    console.human(*render(report, after))
    if any(change.worse for change in report.changes):
        raise CheckFailed(f"{after} is worse than {before}", "the lines above say where; measure again on a quiet machine")


def _savable_name(name: str | None, fit: list[Path], smoke: bool) -> str:
    """What can be told before minutes of measuring."""
    from lpvit_cli.commands.compare import read_report
    from lpvit_cli.recipe.source import is_profile_name

    if smoke:
        raise UsageError("--name: a rehearsal (--smoke) has a small random model", "leave one of the two out")
    if name is None:
        raise UsageError("--fit: which name is the profile to be saved under?", "add: --name NAME")
    if not is_profile_name(name):
        raise UsageError(f"--name {name}: not a name", "use letters, digits, - and _")
    for run in fit:
        read_report(run)
    return name


def _save_profile(console: Console, profile: Any, name: str, fit: list[Path]) -> dict[str, Any]:
    from lpvit_cli.commands.power_fit import save_profile
    from lpvit_cli.report.terminal.profile import power_lines

    saved, path = save_profile(profile, name, fit)
    console.human(*power_lines(saved), f"saved as {name} ({path}): prune for it with --set prune.profile={name}")
    return {"name": name, "path": str(path), "profile": saved.model_dump(mode="json")}


def _with_hub(recipe: Recipe, repository: str) -> Recipe:
    """The recipe with the format that --push uploads among its own."""
    from lpvit_cli.export.push import require_repository_name

    require_repository_name(repository)
    formats = tuple(dict.fromkeys((*recipe.export.formats, "hub")))
    return recipe.model_copy(update={"export": recipe.export.model_copy(update={"formats": formats})})


def _push(console: Console, export: Path, repository: str) -> str:
    from lpvit_cli.export.push import push

    console.note(f"uploading {export / 'hub'} to {repository}")
    address = push(export / "hub", repository, show_progress=console.err.is_terminal and not console.quiet)
    console.human(f"pushed to {address}")
    return address
