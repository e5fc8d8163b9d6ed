"""The verb `evaluate`: the stage, or with --checkpoint any checkpoint into a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dllm.cli.options import Debug, Overrides, ParamsPath, Root

OTHER = "Another checkpoint"


def command(run_stage: Callable[[Path, Sequence[str], Path], None]) -> Callable[..., None]:
    """Return the verb; `run_stage` takes params file, overrides and root."""

    def verb(
        params: ParamsPath = Path("params.yaml"),
        overrides: Overrides = [],  # noqa: B006 (typer copies the default)
        checkpoint: Annotated[
            str | None,
            typer.Option(rich_help_panel=OTHER, help="As for generate, such as models:/NAME@ALIAS. Needs --to."),
        ] = None,
        to: Annotated[
            Path | None,
            typer.Option("--to", metavar="DIR", rich_help_panel=OTHER, help="Output folder: new, or empty."),
        ] = None,
        root: Root = Path(),
        debug: Debug = False,
    ) -> None:
        if checkpoint is None and to is None:
            run_stage(params, overrides, root)
        else:
            _measure(params, overrides, checkpoint, to, root.resolve())

    return verb


def _measure(params: Path, overrides: Sequence[str], checkpoint: str | None, to: Path | None, root: Path) -> None:
    """Measure a checkpoint that is not the stage's, and say its score.

    Raises:
        ConfigError: one of the two options is missing.
        StageError: the output folder lies in the result of a stage.
    """
    from dllm.config.load import load_params
    from dllm.errors import ConfigError
    from dllm.stages.evaluate import run_on
    from dllm.stages.records import check_outside_results

    if checkpoint is None or to is None:
        missing = "--to" if to is None else "--checkpoint"
        raise ConfigError("--checkpoint and --to need each other", where=missing, hint=f"give {missing} too")
    to = to.expanduser()
    check_outside_results(to.resolve())
    method, metrics = run_on(checkpoint, load_params(root / params, overrides), root, to.resolve())
    score = method.score(metrics)
    print(f"{to}: {score.name} {abs(score.value):.3f} of {checkpoint}, on held-out data {metrics['heldout_digest']}")
