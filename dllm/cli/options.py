"""Options of several verbs, and flags derived from dataclass fields.

Imports neither torch nor pydantic, so that `--help` is quick.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from dllm.registry import SAMPLERS

MODEL, PROMPTS, DECODING, OUTPUT, TASKS = "Model", "Prompts", "Decoding", "Output", "Tasks"
DIFFUSION = "Decoding, diffusion models only"
"""Panels of `--help`."""

ParamsPath = Annotated[Path, typer.Option("--params", help="Params file, relative to --root.", show_default=True)]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one value, e.g. train.epochs=2. Repeatable.")
]
Root = Annotated[Path, typer.Option("--root", help="The project's folder: holds params.yaml, work/ and out/.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print a traceback on failure.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=MODEL)
]
Revision = Annotated[
    str | None,
    typer.Option(help="Commit of a Hugging Face model with code of its own.", rich_help_panel=MODEL),
]


def option(*names: str, panel: str, help: str, **more: Any) -> Any:
    """Return a typer option in a panel of `--help`."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def sampler_option(kinds: set[str]) -> Any:
    """Return the option `--sampler`, with the samplers for some kinds of checkpoints.

    Args:
        kinds: of `dllm.models.checkpoints.Checkpoint.kind`.
    """
    names = [name for name, sampler in SAMPLERS.items() if kinds & sampler.settings.keys()]

    def check(name: str | None) -> str | None:
        if name is not None and name not in names:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, names))}")
        return name

    return option(
        panel=DECODING,
        metavar="|".join(names),
        help="By default the one that fits the checkpoint.",
        callback=check,
    )


def sampler_settings() -> list[type]:
    """List the settings classes of all samplers."""
    return list(dict.fromkeys(each for _, sampler in SAMPLERS.items() for each in sampler.settings.values()))


def flags_from(
    classes: Iterable[type], *, into: str, panel: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag per dataclass field, made by `dllm.decoding.settings.setting`.

    The command receives the flags that were given, by field name, as the parameter `into`: a dict.

    Args:
        classes: fields of one name are one flag, described by the first class that has it.
        panel: of `--help`; flags that only diffusion models take are in the panel `DIFFUSION`.
    """
    found: dict[str, tuple[Any, Field[Any]]] = {}
    causal = [each.settings[kind] for _, each in SAMPLERS.items() for kind in each.settings if kind != "diffusion"]
    shared = {field.name for each in causal for field in fields(each)}
    for each in classes:
        hints = get_type_hints(each)
        for field in fields(each):
            if field.metadata.get("help") is not None:
                found.setdefault(field.name, (hints[field.name], field))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        before = [each for each in signature.parameters.values() if each.name != into]
        flags = [
            _parameter(name, hint, field, panel if name in shared else DIFFUSION)
            for name, (hint, field) in found.items()
        ]

        @functools.wraps(command)
        def with_flags(**given: Any) -> None:
            named = {name: given.pop(name) for name in found}
            command(**given, **{into: {name: value for name, value in named.items() if value is not None}})

        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in [*before, *flags]]
        with_flags.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_flags.__annotations__ = {each.name: each.annotation for each in parameters}
        return with_flags

    return decorate


def _parameter(name: str, hint: Any, field: Field[Any], panel: str) -> inspect.Parameter:
    """Return a command's parameter for a dataclass field; null stands for a flag that was not given."""
    bounds, default = field.metadata["bounds"], field.default
    shown = str(default) if field.metadata["show_default"] and default is not None else False
    made = option(
        f"--{name.replace('_', '-')}",
        panel=panel,
        help=field.metadata["help"],
        min=bounds["low"],
        max=bounds["high"],
        show_default=shown,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint | None, made]
    )
