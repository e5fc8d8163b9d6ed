"""The verbs of `python -m dllm`: stages, and the verbs of the files beside this one.

What does the work is imported once a verb is called, so that --help is quick.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dllm import __version__
from dllm.cli import data, export, generate, lm_eval, recipes, track
from dllm.cli import evaluate as evaluate_verb
from dllm.cli import regenerate as regenerate_verb
from dllm.cli import train as train_verb
from dllm.cli.options import Debug, Overrides, ParamsPath, Root
from dllm.process.program import is_script
from dllm.stages import STAGES
from dllm.training import launch

HELP = {
    "prepare": "Collect prompts as chats, and hold some out.",
    "regenerate": "Generate responses to every prompt with the target.",
    "train": "Train a draft or a diffusion model on the responses.",
    "evaluate": "Measure the checkpoint on held-out prompts.",
    "register": "Register the checkpoint as a version of an MLflow model.",
}
"""Help text of each stage."""
IN_RANKS = {"train"}
"""Stages that run as `train.nproc` ranks."""
REPORTS = "register"
"""The stage that ends a run of the pipeline: it writes the report, and MLflow keeps it."""


app = typer.Typer(
    name="dllm",
    help="Train, evaluate and register draft models for speculative decoding, and diffusion LMs.",
    no_args_is_help=True,
    add_completion=is_script(),
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dllm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Take the options that come before a verb."""


app.add_typer(recipes.app, name="recipe")
app.add_typer(data.app, name="data")
app.add_typer(track.app, name="track")


def _stage_verb(name: str) -> Callable[..., None]:
    def verb(
        params: ParamsPath = Path("params.yaml"),
        overrides: Overrides = [],  # noqa: B006 (typer copies the default)
        root: Root = Path(),
        debug: Debug = False,
    ) -> None:
        _run_stage(name, params, overrides, root)

    return verb


def _run_stage(name: str, params: Path, overrides: Sequence[str], root: Path) -> None:
    from dllm.config.load import load_params

    root = root.resolve()
    checked = load_params(root / params, overrides)
    if name in IN_RANKS and checked.train.nproc > 1:
        if not launch.is_rank():
            raise SystemExit(launch.run(sys.orig_argv, checked.train.nproc))  # the ranks run this very command
        launch.note_ranks(checked.train.nproc)
    more = {}
    if name == REPORTS:
        from dllm.report.page import write_report

        more = {"report": write_report}
    importlib.import_module(f"dllm.stages.{name}").run(checked, root, **more)


for _name in STAGES:
    _help = HELP[_name]
    if _name == "regenerate":  # also a command of its own, for those who want only this
        _help += " With --input-data: any chats, without a project."
        app.command(_name, help=_help)(regenerate_verb.command(functools.partial(_run_stage, _name)))
    elif _name == "train":
        _help += " With --dry-run: what that would cost."
        app.command(_name, help=_help)(train_verb.command(functools.partial(_run_stage, _name)))
    elif _name == "evaluate":
        _help += " With --checkpoint: any other one."
        app.command(_name, help=_help)(evaluate_verb.command(functools.partial(_run_stage, _name)))
    else:
        app.command(_name, help=_help)(_stage_verb(_name))


app.command("generate")(generate.command)
app.command("export")(export.command)
app.command("lm-eval")(lm_eval.run)


@app.command()
def serve(
    params: ParamsPath = Path("params.yaml"),
    overrides: Overrides = [],  # noqa: B006 (typer copies the default)
    root: Root = Path(),
    debug: Debug = False,
) -> None:
    """Start SGLang with the target, print its address once it has generated a token, and run until Ctrl-C."""
    from dllm.config.load import load_params
    from dllm.engines import sglang

    root = root.resolve()
    with sglang.launched(load_params(root / params, overrides), root) as server:
        print(server.url, flush=True)
        server.stay()


@app.command()
def verify(root: Root = Path(), debug: Debug = False) -> None:
    """Compare every stored file with its digest; say what is damaged, and how to restore it."""
    from dllm.cli import verify as verb

    verb.verify(root.resolve())


@app.command()
def report(root: Root = Path(), debug: Debug = False) -> None:
    """Print the results of the stages under out/ as one table, and write them with curves and samples as a page."""
    from dllm.report import page, terminal

    root = root.resolve()
    terminal.print_report(root)
    page.write_report(root)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Folders that hold an out/, git revisions, DVC experiments.")],
    root: Root = Path(),
    to: Annotated[Path, typer.Option(help="The page to write.")] = Path("out", "report", "compare.html"),
    debug: Debug = False,
) -> None:
    """Print the figures of several runs side by side, and write them with their curves over one another as a page."""
    from dllm.cli import compare as verb

    verb.print_comparison(runs, root.resolve(), to)
