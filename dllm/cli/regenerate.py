"""`regenerate`: the pipeline's stage, or with --input-data any input to a folder of shards, with nothing but flags.

Defines the flags and maps them to settings.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dllm.errors import ConfigError, DllmError
from dllm.outside import one_line, visible
from dllm.registry import ENGINES

if TYPE_CHECKING:
    from dllm.regeneration.standalone import RegenerateArgs

PIPELINE = {"params", "overrides"}
"""Options of the stage alone; --root and --debug go with both."""
REASONING = {"none": None, "save": True, "disable": False}
THIS = "The pipeline's stage"
INPUT, GENERATION, OUTPUT = "Without a project: input", "Without a project: generation", "Without a project: output"


def _option(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def command(run_stage: Callable[[Path, Sequence[str], Path], None]) -> Callable[..., None]:
    """Return the command.

    Args:
        run_stage: runs the stage with a params file, overrides and the project's folder.
    """

    def regenerate(
        context: typer.Context,
        params: Annotated[Path, _option("--params", panel=THIS, help="Params file, relative to --root.")] = Path(
            "params.yaml"
        ),
        overrides: Annotated[
            list[str], _option("--set", panel=THIS, metavar="KEY=VALUE", help="Override one value. Repeatable.")
        ] = [],  # noqa: B006 (typer copies the default)
        root: Annotated[
            Path, typer.Option("--root", help="The project's folder; relative inputs start there.")
        ] = Path(),
        debug: Annotated[bool, typer.Option("--debug", help="Print a traceback when something fails.")] = False,
        input_data: Annotated[
            str | None,
            _option("--input-data", panel=INPUT, help="Hugging Face id, or parquet/JSON/JSONL, a file or a folder."),
        ] = None,
        split: Annotated[str, _option("--split", panel=INPUT, help="Split of a dataset, or a slice of it.")] = "train",
        subset: Annotated[
            str | None, _option("--subset", "--name", panel=INPUT, help="Configuration of the dataset.")
        ] = None,
        messages_column: Annotated[
            str | None,
            _option("--messages-column", panel=INPUT, help="Column of the chat; else messages or conversations."),
        ] = None,
        ignore_column: Annotated[
            list[str],
            _option(
                "--ignore-column", panel=INPUT, metavar="NAME", help="Column of the prompt to leave out. Repeatable."
            ),
        ] = [],  # noqa: B006 (typer copies the default)
        max_bad_rows: Annotated[
            float | None,
            _option("--max-bad-rows", panel=INPUT, min=0, max=1, help="Share of rows that may be set aside: 0.01."),
        ] = None,
        limit: Annotated[
            int | None, _option("--limit", panel=INPUT, min=1, help="At most so many prompts, the first by id hash.")
        ] = None,
        part: Annotated[
            str | None, _option("--part", panel=INPUT, metavar="I/N", help="One of N parts by prompt id; I from 0.")
        ] = None,
        heldout_fraction: Annotated[
            float,
            _option("--heldout-fraction", panel=INPUT, min=0, max=1, help="Share of prompts held out, by prompt id."),
        ] = 0.0,
        model: Annotated[
            str | None, _option("--model", panel=GENERATION, help="The target, by the name that servers know.")
        ] = None,
        tokenizer: Annotated[
            str | None,
            _option(
                "--tokenizer", panel=GENERATION, help="Model whose tokenizer and chat template to use, if not --model."
            ),
        ] = None,
        target_server: Annotated[
            list[str],
            _option("--target-server", panel=GENERATION, metavar="URL", help="OpenAI-compatible server. Repeatable."),
        ] = [],  # noqa: B006 (typer copies the default)
        engine: Annotated[
            str | None,
            _option("--engine", panel=GENERATION, help="Default: openai with --target-server, else local."),
        ] = None,
        temperature: Annotated[float, _option("--temperature", panel=GENERATION, help="0 is greedy.")] = 0.8,
        top_p: Annotated[float, _option("--top-p", panel=GENERATION, help="Nucleus sampling.")] = 1.0,
        max_new_tokens: Annotated[
            int, _option("--max-new-tokens", panel=GENERATION, help="Longest response, in tokens.")
        ] = 1024,
        samples_per_prompt: Annotated[
            int, _option("--samples-per-prompt", panel=GENERATION, help="Responses per prompt.")
        ] = 1,
        turns: Annotated[
            Literal["all", "last"], _option("--turns", panel=GENERATION, help="Which assistant turns to regenerate.")
        ] = "all",
        reasoning: Annotated[
            Literal["none", "save", "disable"],
            _option("--reasoning", panel=GENERATION, help="Thinking: the template's default; on and kept; off."),
        ] = "none",
        seed: Annotated[
            int, _option("--seed", panel=GENERATION, help="Seed that each request's seed is derived from.")
        ] = 0,
        concurrency: Annotated[
            int, _option("--concurrency", panel=GENERATION, help="Requests in flight over all servers.")
        ] = 64,
        batch_size: Annotated[
            int, _option("--batch-size", panel=GENERATION, help="Rows decoded together, engine local.")
        ] = 64,
        timeout_s: Annotated[float, _option("--timeout-s", panel=GENERATION, help="Timeout of one request.")] = 600.0,
        max_retries: Annotated[int, _option("--max-retries", panel=GENERATION, help="Retries per request.")] = 5,
        max_failure_rate: Annotated[
            float,
            _option("--max-failure-rate", panel=GENERATION, help="Stop when more of the latest requests are refused."),
        ] = 0.2,
        output_dir: Annotated[
            Path | None, _option("--output-dir", panel=OUTPUT, help="New or empty, or with --resume one to continue.")
        ] = None,
        shard_size: Annotated[int, _option("--shard-size", panel=OUTPUT, help="Chats per shard.")] = 1000,
        drop: Annotated[
            list[str], _option("--drop", panel=OUTPUT, metavar="FLAG", help="Leave flagged rows out. Repeatable.")
        ] = [],  # noqa: B006 (typer copies the default)
        resume: Annotated[bool, _option("--resume", panel=OUTPUT, help="Continue what --output-dir holds.")] = False,
        dry_run: Annotated[
            bool,
            _option("--dry-run", panel=OUTPUT, help="Read, count, render one chat, check the server; write nothing."),
        ] = False,
        as_json: Annotated[bool, _option("--json", panel=OUTPUT, help="Print one JSON object at the end.")] = False,
    ) -> None:
        given = {name for name in context.params if _is_given(context, name)}
        if input_data is None:
            _check_alone(given - PIPELINE - {"root", "debug"}, "needs --input-data")
            run_stage(params, overrides, root)
            return
        _check_alone(given & PIPELINE, "does not go with --input-data")
        from dllm.regeneration import standalone

        args = _parse(dict(context.params), given)
        with _errors_name_flags():
            figures = standalone.dry_run(args) if dry_run else standalone.run(args)
        _print(figures, as_json, dry_run)

    return regenerate


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_alone(wrong: set[str], why: str) -> None:
    if wrong:
        name = {"overrides": "set", "as_json": "json"}.get(min(wrong), min(wrong)).replace("_", "-")
        hint = "flags of the stage and of the command without a project are not mixed"
        raise ConfigError(f"--{name} {why}", where="regenerate", hint=hint)


def _parse(flags: dict[str, Any], given: set[str]) -> "RegenerateArgs":
    """Parse the flags; `given`: names of those on the command line.

    Raises:
        ConfigError: a value is out of range, a flag is missing or has no effect, or two do not go together.
    """
    # Here and not above: torch and transformers come with it, and the help must not wait for them.
    from dllm.config.load import parse_as
    from dllm.regeneration.standalone import RegenerateArgs, Settings

    for name in ("output_dir", "model"):
        if flags[name] is None:
            raise ConfigError("missing", where=f"--{name.replace('_', '-')}")
    servers = tuple(flags["target_server"])
    engine = flags["engine"] or ("openai" if servers else "local")
    if servers and not ENGINES[engine].is_external:
        raise ConfigError(
            f"engine {engine} uses no server that is running", where="--target-server", hint="leave one of the two out"
        )
    if ignored := sorted(given & ENGINES[engine].ignores):
        flag = f"--{ignored[0].replace('_', '-')}"
        raise ConfigError(f"has no effect with engine {engine}", where=flag, hint="leave it out")
    settings = (
        *("temperature", "top_p", "max_new_tokens", "samples_per_prompt", "turns", "seed", "concurrency", "batch_size"),
        *("timeout_s", "max_retries", "max_failure_rate", "shard_size", "drop"),
    )
    source = {name: None if flags[flag] == [] else flags[flag] for name, flag in _SOURCE.items()}
    options = {"engine": engine, **{name: flags[name] for name in settings}}
    if "served_model" in ENGINES[engine].affects:
        options["served_model"] = flags["model"]
    elif flags["tokenizer"]:
        raise ConfigError(f"engine {engine} takes the model's own", where="--tokenizer", hint="leave it out")
    raw = {
        "target": {"model": flags["tokenizer"] or flags["model"], "enable_thinking": REASONING[flags["reasoning"]]},
        "source": source,
        "regenerate": options,
    }
    root = flags["root"].resolve()
    return RegenerateArgs(
        settings=parse_as(Settings, raw, "flags of regenerate"),
        output=(root / flags["output_dir"].expanduser()),
        root=root,
        servers=servers,
        part=_part(flags["part"]),
        heldout_fraction=flags["heldout_fraction"],
        resume=flags["resume"],
        track=bool(os.environ.get("MLFLOW_TRACKING_URI")),
    )


_SOURCE = {
    **{"name": "input_data", "split": "split", "subset": "subset", "column": "messages_column", "limit": "limit"},
    **{"ignore_columns": "ignore_column", "max_bad_rows": "max_bad_rows"},
}
"""Flags by the field of the source that they set; an empty list sets null."""


_FLAGS = {"servers": "target-server", "served_model": "model", "model": "model"}
"""Flags named otherwise than the setting."""


@contextlib.contextmanager
def _errors_name_flags() -> Iterator[None]:
    """Name the flags of this command in errors that name the settings of params.yaml."""

    def named(text: str | None) -> str | None:
        if text is None:
            return None
        flag = r"\b(?:regenerate|target)\.(?!sglang\b)([a-z_]+)\b(?!\.)"
        text = re.sub(flag, lambda found: "--" + _FLAGS.get(found[1], found[1]).replace("_", "-"), text)
        return text.replace("run this again", "run this again with --resume")

    try:
        yield
    except DllmError as error:
        raise type(error)(error.message, where=named(error.where), hint=named(error.hint)) from None


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, _, total = text.partition("/")
    if not (index.isdecimal() and total.isdecimal() and int(index) < int(total)):
        raise ConfigError(f"a part reads I/N with I from 0 to N - 1, got {text!r}", where="--part")
    return int(index), int(total)


def _print(found: dict[str, Any], as_json: bool, dry_run: bool) -> None:
    if as_json:
        print(json.dumps(found, default=str))  # in ASCII: nothing in it acts on a terminal
        return
    if not dry_run:
        return
    read = found["input"]
    refused = "".join(f", {number} refused: {reason}" for reason, number in read["refused"].items())
    print(f"{read['rows']} rows, {read['prompts']} prompts, {read['duplicates']} duplicates{refused}")
    print(f"{found['requests']} requests for {found['samples']} samples")
    if found["served"] is not None:
        print(one_line("served by " + ", ".join(f"{name} {value}" for name, value in found["served"].items())))
    print("the first prompt, as the chat template renders it:", flush=True)
    sys.stdout.write(f"{visible(str(found['first_prompt']))}\n")
