"""What all commands share: the app, options that are spelt alike, and how a function becomes a command."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from lpvit_cli import __version__
from lpvit_cli.cli.console import Console
from lpvit_cli.errors import UsageError

app = typer.Typer(
    name="lpvit",
    help="Block-prune vision transformers, recover their accuracy, measure speed and joules, export them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model folder, a run folder, an exported file (.onnx, .pt2, .xml), or a name as in a recipe."
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key; repeatable.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Compute type: auto, float32, bfloat16 or float16.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Images at a time; of bench, profile and export: in a measured call.")
]


@dataclass
class Output:
    """How a command talks."""

    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show causes of errors and library warnings.")] = False

    def console(self) -> Console:
        if not self.verbose:
            warnings.filterwarnings("ignore")
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        return Console(self.json_, self.quiet, self.verbose)


@dataclass
class Order:
    """What all commands that take a recipe understand."""

    recipe: RecipeArgument
    set_: Set = None
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder (default: runs/<recipe name>).")] = None
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Skip what is up to date and continue what was interrupted.")
    ] = True
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Take over a folder that holds something else.")] = False
    device: Device = None
    dtype: Dtype = None
    batch_size: BatchSize = None
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of everything random.")] = None
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Rehearse with a small random model and generated images; its sizes override --set."),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved recipe, what would run, and what prune would give; do nothing."),
    ] = False

    def overrides(self, *, dtype: str = "dtype={}", batch_size: str = "data.batch_size={}") -> list[str]:
        """As --set takes them; `dtype` and `batch_size`: what these options mean for the command."""
        made = list(self.set_ or [])
        made += [f"device={self.device}"] * (self.device is not None)
        made += [dtype.format(self.dtype)] * (self.dtype is not None)
        made += [f"seed={self.seed}"] * (self.seed is not None)
        return made + [batch_size.format(self.batch_size)] * (self.batch_size is not None)


@dataclass
class BenchOrder(Order):
    """As Order, where there may be no recipe: two reports can be compared instead."""

    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")] = ""


class Command(TyperCommand):
    """Tells where an option belongs that this command does not have."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            option = getattr(error, "option_name", None)  # click's NoSuchOption; typer may bring a click of its own
            if type(error).__name__ != "NoSuchOption" or not (owner := _owner(ctx, str(option))):
                raise
            with Console("--json" in given).command():
                raise UsageError(
                    f"{option} is an option of {owner[0]}, not of {self.name}",
                    f"run: {' '.join(['lpvit', *ctx.parent.command_path.split()[1:]])} {owner[0]} {owner[1]}",
                ) from None
            raise  # not reached: the console ends the program


def _owner(ctx: Any, option: str) -> tuple[str, str] | None:
    """The one other command that has this option, and how the option is written there; None where several have it."""
    owners = []
    for name, command in ctx.parent.command.commands.items():
        for parameter in getattr(command, "params", []):
            if option in parameter.opts:
                value = "" if getattr(parameter, "is_flag", False) else f" {parameter.metavar or 'VALUE'}"
                argument = next((p.metavar for p in command.params if p.param_type_name == "argument"), "")
                owners.append((name, f"{argument} {option}{value}"))
    return owners[0] if len(owners) == 1 else None


def command(group: typer.Typer, name: str | None = None, summary: str | None = None) -> Callable[[Any], Any]:
    """Make a function a command of `group`. Its `Console` stands for the options of Output, which it does not see; a
    parameter that is a dataclass stands for the options that its fields are."""

    def register(body: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(body, include_extras=True)
        bundles = {key: kind for key, kind in hints.items() if is_dataclass(kind)}

        def run(**given: Any) -> None:
            console = Output(**{field.name: given.pop(field.name) for field in fields(Output)}).console()
            with console.command():
                for key, kind in bundles.items():
                    given[key] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})  # type: ignore[operator]
                body(console, **given)

        parameters = [*_parameters(body, hints), *_options(Output)]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = body.__doc__
        group.command(name or body.__name__, cls=Command, help=summary)(run)
        return body

    return register


def _parameters(body: Callable[..., None], hints: dict[str, Any]) -> Iterator[Parameter]:
    _, *own = signature(body).parameters.values()
    for parameter in sorted(own, key=lambda one: is_dataclass(hints[one.name])):  # a command's own options first
        kind = hints[parameter.name]
        if is_dataclass(kind):
            yield from _options(kind)
        else:
            yield parameter.replace(annotation=kind, kind=Parameter.KEYWORD_ONLY)


def _options(kind: Any) -> Iterator[Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        default = Parameter.empty if field.default is MISSING else field.default
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name])


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lpvit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass
