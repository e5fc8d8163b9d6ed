"""The verbs of `python -m dllm`: which there are, what each accepts, and which module does the work.

Refuses to do any of the work, and imports what does it only once a verb is called, so that --help is quick.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

STAGES = {
    "prepare": "Collect prompts as chats, and hold some out.",
    "regenerate": "Let the target answer every prompt.",
    "train": "Train a draft on the target's own words.",
    "evaluate": "Decode speculatively on held-out prompts, against plain decoding.",
    "register": "Make the checkpoint a version of an MLflow registered model.",
}
"""Every stage, in the order of the pipeline: also its module, its section of params.yaml and its folder under out/."""

ParamsPath = Annotated[Path, typer.Option("--params", help="Params file, relative to --root.", show_default=True)]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one value, e.g. train.epochs=2. Repeatable.")
]
Root = Annotated[Path, typer.Option("--root", help="The project's folder: holds params.yaml, work/ and out/.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print a traceback when something fails.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a params.yaml that was edited by hand.")]


app = typer.Typer(
    name="dllm",
    help="Train, measure and register models that write in parallel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes = typer.Typer(help="List, show and activate the shipped params files.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")


def _stage_verb(name: str) -> Callable[..., None]:
    def verb(
        params: ParamsPath = Path("params.yaml"),
        overrides: Overrides = [],  # noqa: B006 (typer copies the default)
        root: Root = Path(),
        debug: Debug = False,
    ) -> None:
        import importlib

        from dllm import config

        root = root.resolve()
        checked = config.load(root / params, overrides)
        importlib.import_module(f"dllm.stages.{name}").run(checked, root)

    return verb


for _name, _help in STAGES.items():
    app.command(_name, help=_help)(_stage_verb(_name))


@app.command()
def generate(
    checkpoint: Annotated[
        str, typer.Option(help="models:/NAME@ALIAS, a checkpoint folder, a training step's, or a stage's output.")
    ],
    prompt: Annotated[list[str], typer.Option(help="What the user says. Repeatable.")],
    sampler: Annotated[Literal["dflash", "ar"], typer.Option(help="Speculative, or one token at a time.")] = "dflash",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have.")] = 256,
    block_size: Annotated[int, typer.Option(min=0, help="Slots a round; 0 takes the draft's.")] = 0,
    target: Annotated[str | None, typer.Option(help="Another target than the checkpoint was trained for.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt.")] = False,
    root: Root = Path(),
    debug: Debug = False,
) -> None:
    """Answer prompts with a draft and its target; print tokens per round and acceptance length."""
    from dllm import generation

    generation.run(
        checkpoint=checkpoint,
        prompts=prompt,
        sampler=sampler,
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        target=target,
        as_json=as_json,
        root=root.resolve(),
    )


@app.command()
def report(root: Root = Path(), debug: Debug = False) -> None:
    """Print one table of what the stages under out/ found."""
    from dllm import report as tables

    tables.print_report(root.resolve())


@recipes.command("list")
def list_recipes(debug: Debug = False) -> None:
    """Name every recipe, with its first comment line."""
    from dllm import recipe_book

    for name, summary in recipe_book.summaries().items():
        typer.echo(f"{name:28}{summary}")


@recipes.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A name from `recipe list`.")], debug: Debug = False) -> None:
    """Print a recipe as it would stand in params.yaml."""
    from dllm import recipe_book

    typer.echo(recipe_book.text(name), nl=False)


@recipes.command("use")
def use_recipe(
    name: Annotated[str, typer.Argument(help="A name from `recipe list`.")],
    params: ParamsPath = Path("params.yaml"),
    force: Force = False,
    root: Root = Path(),
    debug: Debug = False,
) -> None:
    """Write a recipe to params.yaml, unless that was edited by hand."""
    from dllm import recipe_book

    path = root.resolve() / params
    recipe_book.activate(name, path, force=force)
    typer.echo(f"{path.name} is now {name}")
