"""The verb `train`: the stage, or with --dry-run what it would cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dllm.cli.options import Debug, Overrides, ParamsPath, Root

if TYPE_CHECKING:
    from dllm.config.params import Params, Source
    from dllm.training.plan import Device, Workload

PLAN = "Dry run"
WIDTH = 110
SHARE = 0.4
"""Of the bf16 peak that a step of a draft reaches on a GPU, as an assumption."""


def command(run_stage: Callable[[Path, Sequence[str], Path], None]) -> Callable[..., None]:
    """Return the verb; `run_stage` takes params file, overrides and root."""

    def verb(
        params: ParamsPath = Path("params.yaml"),
        overrides: Overrides = [],  # noqa: B006 (typer copies the default)
        dry_run: Annotated[
            bool,
            typer.Option("--dry-run", rich_help_panel=PLAN, help="Print what a run would need, and start nothing."),
        ] = False,
        on: Annotated[
            str | None,
            typer.Option("--on", metavar="h100|h200", rich_help_panel=PLAN, help="Plan for it; default: this machine."),
        ] = None,
        target_config: Annotated[
            Path | None,
            typer.Option(rich_help_panel=PLAN, help="A config.json with the shapes of the target."),
        ] = None,
        rows: Annotated[
            int | None, typer.Option(min=1, rich_help_panel=PLAN, help="Training rows, if they do not exist yet.")
        ] = None,
        length: Annotated[
            int | None,
            typer.Option(min=2, rich_help_panel=PLAN, help="Mean tokens of such a row."),
        ] = None,
        share_of_peak: Annotated[
            float | None,
            typer.Option(
                min=0.01, max=1, rich_help_panel=PLAN, help=f"Of the bf16 peak, reached by a step; default: {SHARE:g}."
            ),
        ] = None,
        root: Root = Path(),
        debug: Debug = False,
    ) -> None:
        if dry_run:
            from dllm.config.load import load_params

            checked = load_params(root.resolve() / params, overrides)
            print_plan(checked, root.resolve(), on, target_config, rows, length, share_of_peak or SHARE)
        else:
            _refuse_plan_options(
                on=on, target_config=target_config, rows=rows, length=length, share_of_peak=share_of_peak
            )
            run_stage(params, overrides, root)

    return verb


def print_plan(
    params: Params,
    root: Path,
    on: str | None,
    target_config: Path | None,
    rows: int | None,
    length: int | None,
    share: float,
) -> None:
    """Print a plan as a table, then refuse what has no room.

    Raises:
        ConfigError: there is no such device, or the number of rows is not known.
        ModelError: the target's shapes are not known, or cannot be trained.
        StageError: a rank has too little memory.
    """
    from rich.console import Console
    from rich.table import Table

    from dllm.methods.method import PlanContext
    from dllm.models.known_targets import planned_target
    from dllm.registry import METHODS
    from dllm.training import plan as plans

    ranks = params.train.nproc
    device = _device(on, ranks)
    workload = _workload(params, root, rows, length)
    target = planned_target(params.target, target_config)
    settings = params.train.method_settings
    found = METHODS[params.train.mode].plan(PlanContext(params, settings, target, workload, ranks, device.kind))
    schedule = plans.Schedule.of(params.train, workload.rows, ranks)
    table = Table(title=f"dry run: {params.recipe}", show_header=False, title_justify="left")
    for label, value in plans.rows_of(found, workload, schedule, device, share):
        table.add_row(label, value)
    console = Console()
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH  # a pipe would get 80 columns
    console.print(table)
    plans.check_fits(found, device)


def _device(name: str | None, ranks: int) -> Device:
    """Return a device by its name, or this machine's memory for one rank."""
    import psutil
    import torch

    from dllm.errors import ConfigError
    from dllm.training.plan import DEVICES, Device

    if name is not None:
        if name not in DEVICES:
            raise ConfigError(f"no device {name!r} is known", where="--on", hint=f"there are {', '.join(DEVICES)}")
        return DEVICES[name]
    if torch.cuda.is_available():
        return Device("a GPU of this machine", torch.cuda.get_device_properties(0).total_memory)
    title = f"this machine, shared by {ranks}" if ranks > 1 else "this machine"
    return Device(title, psutil.virtual_memory().total // ranks, kind="cpu")


def _workload(params: Params, root: Path, rows: int | None, length: int | None) -> Workload:
    """Take the rows of out/regenerate; where there are none, the limits of the sources and the longest row."""
    from dllm.errors import ConfigError
    from dllm.stages.training_rows import read_splits
    from dllm.training.plan import Workload

    longest = params.train.max_length
    if rows is None and length is None and (root / "out" / "regenerate" / "manifest.json").is_file():
        kept = read_splits(root / "out" / "regenerate", params.target, params.train)[0].kept
        mean = sum(map(len, kept)) / len(kept)
        supervised = sum(len(row) - row.prompt_length for row in kept) / len(kept)
        return Workload(len(kept), mean, max(map(len, kept)), supervised, "out/regenerate")
    source = "--rows"
    if rows is None:
        found = [(each.name, _num_prompts(each, root)) for each in params.prepare.sources]
        unknown = [name for name, number in found if number is None]
        prompts = sum(number or 0 for _, number in found)
        if not prompts:
            raise ConfigError("the number of prompts is not known before they are read", where="--rows")
        rows = round(prompts * (1 - params.prepare.heldout_fraction)) * params.regenerate.samples_per_prompt
        source = "by prepare.sources" + (f", without {', '.join(unknown)}" if unknown else "")
    if length is None:
        source += "; at most, by train.max_length"
    length = min(length or longest, longest)
    return Workload(rows, length, longest, min(length, params.regenerate.max_new_tokens), source)


def _num_prompts(source: Source, root: Path) -> int | None:
    """Return a source's limit, or count the rows of a built-in one; None if nothing less than reading it would tell."""
    from dllm.prompts.sources import rows
    from dllm.registry import SOURCES

    if (stated := source.limit or source.size) is not None:
        return stated
    return sum(1 for _ in rows(source, root)) if source.name in SOURCES else None


def _refuse_plan_options(**given: object) -> None:
    from dllm.errors import ConfigError

    if named := [name for name, value in given.items() if value is not None]:
        raise ConfigError("this option has an effect with --dry-run only", where=f"--{named[0].replace('_', '-')}")
