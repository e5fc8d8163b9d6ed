"""The verbs `data verify`, `show`, `diff` and `merge`; pyarrow and torch are imported when a verb needs them."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dllm.cli.options import Debug, Root

app = typer.Typer(help="Verify, show, compare and merge folders of regenerated responses.", no_args_is_help=True)

Responses = Annotated[Path, typer.Argument(metavar="D", help="A folder of responses: shards and a manifest.")]


@app.command("verify")
def verify_data(
    folder: Responses,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Check every hash, row and count against the manifest."""
    from dllm.responses.verify import verify

    found = verify(folder)
    if as_json:
        print(json.dumps({"folder": str(folder), "whole": True, "checked": found}))
        return
    table = Table(title=f"{folder} is whole", show_header=False, title_justify="left")
    for check, finding in found.items():
        table.add_row(check, finding)
    Console(soft_wrap=True).print(table)


@app.command("show")
def show_data(
    folder: Responses,
    row: Annotated[int | None, typer.Option(min=0, help="Only this row, 0-based.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Rows of this prompt: its id, or a prefix of it.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most rows to print.")] = 3,
    tokens: Annotated[bool, typer.Option("--tokens", help="Token by token, with ids.")] = False,
    max_length: Annotated[int | None, typer.Option(min=1, help="As train.max_length; longer rows are cut.")] = None,
    model: Annotated[str | None, typer.Option(help="Use this model's tokenizer instead of the manifest's.")] = None,
    debug: Debug = False,
) -> None:
    """Print rows, and mark the tokens that training supervises."""
    from dllm.cli.show import show_folder

    show_folder(folder, row=row, prompt=prompt, limit=limit, tokens=tokens, max_length=max_length, model=model)


@app.command("diff")
def diff_data(
    a: Annotated[str, typer.Argument(metavar="A", help="A folder, a git revision, or a DVC experiment.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What it is compared with.")] = "out/regenerate",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    root: Root = Path(),
    debug: Debug = False,
) -> None:
    """Compare two regenerations: rows added and removed, responses changed, lengths, flags, settings.

    Of a revision, out/regenerate is taken from DVC's cache or remote; the working tree stays as it is.
    """
    from dllm.cli.data_diff import print_diff

    print_diff(a, b, root.resolve(), as_json)


@app.command("merge")
def merge_data(
    folders: Annotated[list[Path], typer.Argument(metavar="D1 D2 ...", help="The parts, in any order.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Output folder: new, or empty.")],
    debug: Debug = False,
) -> None:
    """Merge all parts of a regeneration into one folder; rows are unchanged."""
    from dllm.responses.merge import merge

    merged = merge(folders, output_dir)
    print(f"{output_dir}: {merged['rows']} rows, {merged['tokens']} tokens of {len(folders)} parts", flush=True)
