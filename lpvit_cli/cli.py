"""The command line: parse, call a stage, print. torch is imported when a command runs, never for --help."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from lpvit_cli import __version__, distributed
from lpvit_cli.console import Console
from lpvit_cli.errors import CheckFailed, EnvironmentFault, UsageError
from lpvit_cli.stages import BENCH, CALIBRATE, EXPORT, FINETUNE, GRADUAL, PROFILE, PRUNE, STAGES, SWEEP, Stage

app = typer.Typer(
    name="lpvit",
    help="Block-prune vision transformers, recover their accuracy, measure speed and joules, export them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="List, show and validate recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model folder, a run folder, a timm name, or an exported file (.onnx, .pt2, .xml)."),
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key; repeatable.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run folder (default: runs/<recipe name>).")]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Skip what is up to date and continue what was interrupted.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Take over a folder that holds something else.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Compute type: auto, float32, bfloat16 or float16.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Batch size of this command.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of everything random.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved recipe, what would run, and what prune would give; do nothing.")
]
SMOKE_HELP = "Rehearse with a small random model and generated images; its sizes override --set."
Smoke = Annotated[bool, typer.Option("--smoke", help=SMOKE_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show causes of errors and library warnings.")]


def _console(json_mode: bool, quiet: bool, verbose: bool) -> Console:
    if not verbose:
        warnings.filterwarnings("ignore")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return Console(json_mode, quiet, verbose)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lpvit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


BATCH_SIZE_KEYS = {
    CALIBRATE.command: "calibrate.batch_size={}",
    BENCH.command: "bench.batch_sizes=[{}]",
    PROFILE.command: "profile.batch_size={}",
    EXPORT.command: "export.batch_size={}",
}


def _add_recipe_command(command: str, stages: tuple[Stage, ...], summary: str) -> None:
    """All commands that take a recipe have the same options, and differ in the stages they run."""

    help_ = "Prune to each of these budgets instead, for example 0.3,0.5,0.7 (of the kind of prune.budget)."
    sweep_option = typer.Option(None, "--sweep", metavar="BUDGETS", help=help_, hidden=command != PRUNE.command)
    help_ = "Upload the export (format hub) to this Hugging Face repository, made private where there is none."
    push_option = typer.Option(None, "--push", metavar="OWNER/NAME", help=help_, hidden=command != EXPORT.command)
    help_ = "onnx, torch, pt2, aoti, openvino, triton-server or hub; repeatable (default: onnx)."
    format_option = typer.Option(None, "--format", metavar="FORMAT", help=help_, hidden=command != EXPORT.command)
    other = command != BENCH.command
    help_ = "Another run folder, model folder or ONNX file: all ratios are against it."
    baseline_option = typer.Option(None, "--baseline", metavar="MODEL", help=help_, hidden=other)
    layers_option = typer.Option(False, "--layers", help="Time every linear layer within the model.", hidden=other)
    require_energy_option = typer.Option(False, "--require-energy", help="Exit 3 where no meter gave energy.", hidden=other)
    help_ = "Measure energy on a GPU split by MIG too."
    allow_mig_option = typer.Option(False, "--allow-mig", help=help_, hidden=other)
    help_ = "Instead of measuring: exit 4 when B is slower or thirstier than A, reports or run folders."
    compare_option = typer.Option(None, "--compare", metavar="A B", help=help_, hidden=other)
    force_option = typer.Option(False, "--force", help="Compare reports of different devices or settings.", hidden=other)
    help_ = "Save the profile under this name for all recipes: --set prune.profile=NAME."
    name_option = typer.Option(None, "--name", metavar="NAME", help=help_, hidden=command != PROFILE.command)
    help_ = "Save it with the power model of these run folders, benched at several sparsities; repeatable."
    fit_option = typer.Option(None, "--fit", metavar="RUN", help=help_, hidden=command != PROFILE.command)
    help_ = "A recipe file, or the name of a shipped one."
    recipe_argument = typer.Argument(... if other else None, metavar="RECIPE", help=help_)

    @app.command(command, help=summary)
    def recipe_command(
        recipe: str | None = recipe_argument,
        set_: Set = None,
        output: Output = None,
        resume: Resume = True,
        overwrite: Overwrite = False,
        device: Device = None,
        dtype: Dtype = None,
        batch_size: BatchSize = None,
        seed: Seed = None,
        smoke: Smoke = False,
        dry_run: DryRun = False,
        json_: Json = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
        sweep: str | None = sweep_option,
        push: str | None = push_option,
        format_: list[str] | None = format_option,
        baseline: str | None = baseline_option,
        layers: bool = layers_option,
        require_energy: bool = require_energy_option,
        allow_mig: bool = allow_mig_option,
        compare: tuple[Path, Path] | None = compare_option,
        force: bool = force_option,
        name: str | None = name_option,
        fit: list[Path] | None = fit_option,
    ) -> None:
        console = _console(json_, quiet, verbose)
        with console.command():
            for option, given, owner, example in (
                ("--sweep", sweep, PRUNE.command, "--sweep 0.3,0.5,0.7"),
                ("--push", push, EXPORT.command, "--push OWNER/NAME"),
                ("--format", format_, EXPORT.command, "--format hub"),
                ("--baseline", baseline, BENCH.command, "--baseline OTHER_RUN"),
                ("--layers", layers, BENCH.command, "--layers"),
                ("--require-energy", require_energy, BENCH.command, "--require-energy"),
                ("--allow-mig", allow_mig, BENCH.command, "--allow-mig"),
                ("--compare", compare, BENCH.command, "--compare A B"),
                ("--force", force, BENCH.command, "--compare A B --force"),
                ("--name", name, PROFILE.command, "--name NAME"),
                ("--fit", fit, PROFILE.command, "--name NAME --fit RUN --fit OTHER_RUN"),
            ):
                if given and command != owner:
                    raise UsageError(
                        f"{option} is an option of {owner}, not of {command}", f"run: lpvit {owner} RECIPE {example}"
                    )
            if compare is not None:
                _compare(console, *compare, force)
                return
            if force:
                raise UsageError("--force is for --compare", "run: lpvit bench --compare A B --force")
            if recipe is None:
                raise UsageError(f"{command}: which recipe?", f"run: lpvit {command} RECIPE, or: lpvit {command} --compare A B")
            overrides = list(set_ or [])
            overrides += [f"bench.baseline={baseline}"] * (baseline is not None)
            overrides += ["bench.layers=true"] * layers
            overrides += ["bench.energy.required=true"] * require_energy
            overrides += ["bench.energy.allow_mig=true"] * allow_mig
            overrides += [f"sweep=[{sweep}]"] * (sweep is not None)
            overrides += [f"export.formats=[{','.join(format_)}]"] if format_ else []
            overrides += [f"device={device}"] * (device is not None)
            if dtype is not None:
                measures = command in (BENCH.command, PROFILE.command)
                overrides.append(f"bench.dtypes=[{dtype}]" if measures else f"dtype={dtype}")
            overrides += [f"seed={seed}"] * (seed is not None)
            if batch_size is not None:
                overrides.append(BATCH_SIZE_KEYS.get(command, "data.batch_size={}").format(batch_size))
            stages_ = stages if sweep is None else (SWEEP,)
            if name is not None or fit:
                _require_savable(name, fit or [], smoke)
            _run_stages(console, stages_, recipe, overrides, output, resume, overwrite, smoke, dry_run, push, name, fit or [])


def _run_stages(
    console: Console,
    stages: tuple[Stage, ...],
    recipe_name: str,
    overrides: list[str],
    output: Path | None,
    resume: bool,
    overwrite: bool,
    smoke: bool,
    dry_run: bool,
    push: str | None,
    name: str | None,
    fit: list[Path],
) -> None:
    from lpvit_cli.recipe import Recipe

    recipe = Recipe.load(recipe_name, overrides)
    if push is not None and smoke:
        raise UsageError("--push: a rehearsal (--smoke) has a random model", "leave one of the two out")
    if push is not None:
        recipe = _with_hub(recipe, push)
    if smoke:
        from lpvit_cli.models import shrink

        recipe = recipe.smoke(*shrink(recipe.model))
    from lpvit_cli.report.tables import render, summary
    from lpvit_cli.run import Run

    run = Run(recipe, output or Path("runs") / recipe.name)
    if len(stages) > 1 and recipe.finetune is None:
        stages = tuple(stage for stage in stages if stage is not FINETUNE)
    if len(stages) > 1 and recipe.schedule:
        stages = (GRADUAL, *(stage for stage in stages if stage not in (CALIBRATE, PRUNE, FINETUNE)))
    if len(stages) > 1 and recipe.prune.profile is None and recipe.prune.budget.needs_profile:
        stages = (PROFILE, *stages)
    if "onnx" in recipe.bench.subjects:
        stages = tuple(sorted(stages, key=lambda stage: stage is BENCH))  # it measures the file that export writes
    if dry_run:
        plan = {stage.command: _plan(run.changes(stage), resume) for stage in stages}
        plan |= {"push": f"to {push}"} if push is not None else {}
        console.document = {"recipe": recipe.model_dump(mode="json"), "output": str(run.folder), "stages": plan}
        console.human(recipe.to_yaml(), f"# output: {run.folder}", *(f"# {stage}: {what}" for stage, what in plan.items()))
        if PRUNE in stages or SWEEP in stages:
            from lpvit_cli.stages.prune import predict

            prediction = predict(recipe, run, console.progress)
            console.document["prediction"] = prediction.model_dump(mode="json")
            console.human("", *render(prediction, run.folder))
        return
    _require_together(stages)
    reports = {}
    with distributed.joined(on_gpus=_on_gpus(recipe)), run.open(overwrite):
        for number, stage in enumerate(stages, start=1):
            position = f"[{number}/{len(stages)}] " if len(stages) > 1 else ""
            changes = distributed.from_main(run.changes(stage))
            if resume and changes == []:
                from lpvit_cli.report.schema import REPORTS

                report = run.report(stage, REPORTS[stage.command])
                console.note(f"{position}{stage.command}: up to date, skipped ({run.folder / stage.folder})")
                if len(stages) == 1:
                    console.human(*render(report, run.folder / stage.folder))
            else:
                why = f" again ({changes[0]})" if changes else ""
                console.note(f"{position}{stage.command}{why}")
                report = run.execute(stage, console.progress, resume)
                console.human(*render(report, run.folder / stage.folder), *([""] if len(stages) > 1 else []))
            reports[stage.command] = report
            if stage is BENCH and recipe.bench.energy.required:
                _require_energy(report, run.folder / BENCH.folder)
        more: dict[str, Any] = {"pushed": _push(console, run.folder / EXPORT.folder, push)} if push is not None else {}
        if name is not None:
            more["saved"] = _save_profile(console, reports[PROFILE.command].profile, name, fit)
    documents: dict[str, Any] = {command: report.model_dump(mode="json") for command, report in reports.items()}
    if len(stages) > 1:
        console.human(summary(recipe.name, reports, run.folder))
        console.document = documents
    else:
        console.document = documents[stages[0].command] | more


def _require_together(stages: tuple[Stage, ...]) -> None:
    together = (CALIBRATE, FINETUNE)
    if distributed.world() > 1 and not set(stages) <= set(together):
        alone = next(stage for stage in stages if stage not in together)
        raise UsageError(
            f"{alone.command} runs in one process, not under torchrun",
            f"torchrun takes {' and '.join(stage.command for stage in together)}; run the others without it",
        )


def _on_gpus(recipe: Any) -> bool:
    """Whether the processes of this job, if there are several, work on GPUs, each on its own."""
    if distributed.world() == 1:
        return False
    import torch

    from lpvit_cli.models import device_of

    device = device_of(recipe)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device.type == "cuda"


def _require_energy(report: Any, folder: Path) -> None:
    if report.energy_reasons:
        raise EnvironmentFault(
            f"energy was not measured: {report.energy_reasons[0]}", f"see lpvit doctor; the times are kept in {folder}"
        )


def _compare(console: Console, before: Path, after: Path, force: bool) -> None:
    from lpvit_cli.report.tables import render
    from lpvit_cli.stages.compare import compare

    report = compare(before, after, force)
    console.document = report.model_dump(mode="json")
    console.human(*render(report, after))
    if any(change.worse for change in report.changes):
        raise CheckFailed(f"{after} is worse than {before}", "the lines above say where; measure again on a quiet machine")


def _require_savable(name: str | None, fit: list[Path], smoke: bool) -> None:
    """What can be told before minutes of measuring."""
    from lpvit_cli.recipe_source import is_profile_name
    from lpvit_cli.stages.compare import read_report

    if smoke:
        raise UsageError("--name: a rehearsal (--smoke) has a small random model", "leave one of the two out")
    if name is None:
        raise UsageError("--fit: which name is the profile to be saved under?", "add: --name NAME")
    if not is_profile_name(name):
        raise UsageError(f"--name {name}: not a name", "use letters, digits, - and _")
    for run in fit:
        read_report(run)


def _save_profile(console: Console, profile: Any, name: str, fit: list[Path]) -> dict[str, Any]:
    from lpvit_cli.report.tables import power_lines
    from lpvit_cli.stages.power import save_profile

    saved, path = save_profile(profile, name, fit)
    console.human(*power_lines(saved), f"saved as {name} ({path}): prune for it with --set prune.profile={name}")
    return {"name": name, "path": str(path), "profile": saved.model_dump(mode="json")}


def _with_hub(recipe: Any, repository: str) -> Any:
    """The recipe with the format that --push uploads among its own."""
    from lpvit_cli.export.hub import require_repository_name

    require_repository_name(repository)
    formats = tuple(dict.fromkeys((*recipe.export.formats, "hub")))
    return recipe.model_copy(update={"export": recipe.export.model_copy(update={"formats": formats})})


def _push(console: Console, export: Path, repository: str) -> str:
    from lpvit_cli.export.hub import push

    console.note(f"uploading {export / 'hub'} to {repository}")
    address = push(export / "hub", repository, show_progress=console.err.is_terminal and not console.quiet)
    console.human(f"pushed to {address}")
    return address


def _plan(changes: list[str] | None, resume: bool) -> str:
    if changes is None:
        return "runs"
    if changes:
        return f"runs again ({changes[0]})"
    return "up to date" if resume else "runs again (--no-resume)"


for _stage in (*STAGES, GRADUAL, PROFILE):
    _add_recipe_command(_stage.command, (_stage,), _stage.summary)
_add_recipe_command("run", STAGES, "All stages in order, skipping what is up to date.")


@app.command()
def evaluate(
    model: ModelArgument,
    dataset: Annotated[str | None, typer.Option("--dataset", help="digits, folder, tar, hfds/NAME or wds/NAME.")] = None,
    root: Annotated[Path | None, typer.Option("--root", help="Where the images are.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Which split (default: the one it was validated on).")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Evaluate on this many images only.")] = None,
    batch_size: BatchSize = None,
    device: Device = None,
    dtype: Dtype = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Top-1 and top-5 accuracy of a model folder, an exported file or a timm model."""
    console = _console(json_, quiet, verbose)
    with console.command():
        from lpvit_cli.report.tables import render
        from lpvit_cli.stages.evaluate import evaluate as evaluate_any

        report = evaluate_any(
            model, dataset, root, split, limit, batch_size or 64, device or "auto", dtype or "auto", console.progress
        )
        console.document = report.model_dump(mode="json")
        console.human(*render(report, Path(model)))


@app.command()
def predict(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes to print.")] = 5,
    device: Device = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The most likely classes of images, with the preprocessing the model was made with."""
    console = _console(json_, quiet, verbose)
    with console.command():
        from lpvit_cli.report.tables import render
        from lpvit_cli.stages.predict import predict as predict_any

        report = predict_any(model, images, top, device or "auto")
        console.document = report.model_dump(mode="json")
        console.human(*render(report, Path(model)))


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(metavar="PRUNED", help="The model folder that was recovered, RUN/pruned.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A recovered folder, or its adapter.safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The model folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Add an adapter into the pruned model it was made for; every zero block stays zero."""
    console = _console(json_, quiet, verbose)
    with console.command():
        from lpvit_cli.stages.merge import merge as merge_any

        merge_any(base, adapter, output, overwrite)
        console.document = {"model": str(output)}
        console.human(f"merged {adapter} into {base}; zero blocks checked; model folder: {output}")


@app.command()
def tune(
    model: ModelArgument,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Batch to tune for; repeatable (default: 1, 16, 256).")
    ] = None,
    training: Annotated[bool, typer.Option("--training", help="Tune the backward pass too.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads (default: torch's).")] = None,
    device: Device = None,
    dtype: Dtype = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Time every way to run each block-sparse layer on this device, dense included; lpvit then takes the fastest."""
    console = _console(json_, quiet, verbose)
    with console.command():
        from lpvit_cli.report.tables import render
        from lpvit_cli.stages.tune import tune_any

        report = tune_any(
            model, batch_size or [1, 16, 256], training, threads, device or "auto", dtype or "auto", console.progress
        )
        console.document = report.model_dump(mode="json")
        console.human(*render(report, Path(model)))


@app.command()
def doctor(json_: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """What this machine can do: versions, devices, power meters, optional packages; and how to get what is missing."""
    console = _console(json_, quiet, verbose)
    with console.command():
        from lpvit_cli.doctor import examine
        from lpvit_cli.report.tables import findings_table

        findings = examine()
        console.document = [finding.__dict__ for finding in findings]
        console.human(findings_table(findings))


@recipes_app.command("list")
def recipes_list(json_: Json = False) -> None:
    """The shipped recipes, with what each is for."""
    console = _console(json_, False, False)
    with console.command():
        from lpvit_cli.recipe import shipped_recipes
        from lpvit_cli.report.tables import recipes_table

        console.document = [path.stem for path in shipped_recipes()]
        console.human(recipes_table(shipped_recipes()))


@recipes_app.command("show")
def recipes_show(recipe: RecipeArgument, json_: Json = False) -> None:
    """Print a recipe as it is written; --json resolves it, with every default."""
    console = _console(json_, False, False)
    with console.command():
        from lpvit_cli.recipe import Recipe, find_recipe

        if json_:
            console.document = Recipe.load(recipe).model_dump(mode="json")
        else:
            typer.echo(find_recipe(recipe).read_text().rstrip())


@recipes_app.command("validate")
def recipes_validate(recipe: RecipeArgument, set_: Set = None, json_: Json = False) -> None:
    """Check a recipe without running it."""
    console = _console(json_, False, False)
    with console.command():
        from lpvit_cli.recipe import Recipe

        loaded = Recipe.load(recipe, set_ or [])
        console.document = {"valid": True, "name": loaded.name}
        console.human(f"{recipe}: valid")


def main() -> Any:
    return app()
