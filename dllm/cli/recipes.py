"""The verbs `recipe list`, `show` and `use`; what reads recipes imports pydantic, which --help does without."""

from pathlib import Path
from typing import Annotated

import typer

from dllm.cli.options import Debug, ParamsPath, Root

app = typer.Typer(help="List, show and activate the shipped params files.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A name from `recipe list`.")]


@app.command("list")
def list_recipes(debug: Debug = False) -> None:
    """List every recipe with its first comment line."""
    from dllm.config import recipe_book

    for name, summary in recipe_book.summaries().items():
        typer.echo(f"{name:34}{summary}")


@app.command("show")
def show_recipe(name: Name, debug: Debug = False) -> None:
    """Print a recipe as `use` writes it: every key, defaults included."""
    from dllm.config import recipe_book

    typer.echo(recipe_book.text(name), nl=False)


@app.command("use")
def use_recipe(
    name: Name,
    params: ParamsPath = Path("params.yaml"),
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite a params.yaml whose values are those of no recipe.")
    ] = False,
    root: Root = Path(),
    debug: Debug = False,
) -> None:
    """Write a recipe to params.yaml with every key, unless the file there has values of its own."""
    from dllm.config import recipe_book

    path = root.resolve() / params
    recipe_book.activate(name, path, force=force)
    typer.echo(f"{path.name} is now {name}")
