"""Commands about this machine and about recipes: doctor, recipes list, show and validate."""

from __future__ import annotations

import typer

from lpvit_cli.cli.common import RecipeArgument, Set, app, command
from lpvit_cli.cli.console import Console
from lpvit_cli.errors import escaped

recipes_app = typer.Typer(help="List, show and validate recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")


@command(app)
def doctor(console: Console) -> None:
    """What this machine can do: versions, devices, power meters, optional packages; and how to get what is missing."""
    from lpvit_cli.commands.doctor import examine
    from lpvit_cli.report.terminal.tools import findings_table

    findings = examine()
    console.document = [finding.__dict__ for finding in findings]
    console.human(findings_table(findings))


@command(recipes_app, "list")
def recipes_list(console: Console) -> None:
    """The shipped recipes, with what each is for."""
    from lpvit_cli.recipe.shipped import shipped_recipes
    from lpvit_cli.report.terminal.tools import recipes_table

    console.document = [path.stem for path in shipped_recipes()]
    console.human(recipes_table(shipped_recipes()))


@command(recipes_app, "show")
def recipes_show(console: Console, recipe: RecipeArgument) -> None:
    """Print a recipe as it is written; --json resolves it, with every default."""
    from lpvit_cli.recipe import Recipe
    from lpvit_cli.recipe.shipped import find_recipe
    from lpvit_cli.recipe.source import read_text

    if console.json_mode:
        console.document = Recipe.load(recipe).plain()
    else:
        typer.echo(escaped(read_text(find_recipe(recipe)).rstrip()))


@command(recipes_app, "validate")
def recipes_validate(console: Console, recipe: RecipeArgument, set_: Set = None) -> None:
    """Check a recipe without running it."""
    from lpvit_cli.recipe import Recipe

    loaded = Recipe.load(recipe, set_ or [])
    console.document = {"valid": True, "name": loaded.name}
    console.human(f"{recipe}: valid")
