"""`regenerate`: the pipeline's stage, or with --input-data any input to a folder of shards, with nothing but flags.

Owns the flags and what they mean as params. Imports what does the work only once it is called.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from dllm.regeneration.standalone import Order

PIPELINE = {"params", "overrides"}
"""Options of the stage alone; --root and --debug go with both."""
REASONING = {"none": None, "save": True, "disable": False}
THIS = "The pipeline's stage"
INPUT, ASKING, OUTPUT = "Without a project: input", "Without a project: asking", "Without a project: output"


def _option(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def command(run_stage: Callable[[Path, Sequence[str], Path], None]) -> Callable[..., None]:
    """Make the verb.

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
            str | None, _option("--subset", "--name", panel=INPUT, help="Dataset's configuration.")
        ] = None,
        messages_column: Annotated[
            str | None,
            _option("--messages-column", panel=INPUT, help="Column of the chat; else messages or conversations."),
        ] = None,
        limit: Annotated[int | None, _option("--limit", panel=INPUT, min=1, help="The first so many prompts.")] = None,
        part: Annotated[
            str | None, _option("--part", panel=INPUT, metavar="I/N", help="One of N parts by prompt id; I from 0.")
        ] = None,
        heldout_fraction: Annotated[
            float, _option("--heldout-fraction", panel=INPUT, min=0, max=1, help="Share marked held out, by prompt id.")
        ] = 0.0,
        model: Annotated[
            str | None, _option("--model", panel=ASKING, help="The target, by the name that servers know it by.")
        ] = None,
        tokenizer: Annotated[
            str | None, _option("--tokenizer", panel=ASKING, help="Model whose chat template it is, if not --model.")
        ] = None,
        target_server: Annotated[
            list[str],
            _option("--target-server", panel=ASKING, metavar="URL", help="OpenAI-compatible server. Repeatable."),
        ] = [],  # noqa: B006 (typer copies the default)
        engine: Annotated[
            str | None,
            _option("--engine", panel=ASKING, help="Else openai with --target-server, local without."),
        ] = None,
        temperature: Annotated[float, _option("--temperature", panel=ASKING, help="0 is greedy.")] = 0.8,
        top_p: Annotated[float, _option("--top-p", panel=ASKING, help="Nucleus.")] = 1.0,
        max_new_tokens: Annotated[
            int, _option("--max-new-tokens", panel=ASKING, help="Tokens an answer may have.")
        ] = 1024,
        samples_per_prompt: Annotated[int, _option("--samples-per-prompt", panel=ASKING, help="Answers a prompt.")] = 1,
        turns: Annotated[
            Literal["all", "last"], _option("--turns", panel=ASKING, help="Which assistant turns are answered anew.")
        ] = "all",
        reasoning: Annotated[
            Literal["none", "save", "disable"],
            _option("--reasoning", panel=ASKING, help="Thinking: as the template does it; asked for and kept; off."),
        ] = "none",
        seed: Annotated[int, _option("--seed", panel=ASKING, help="Each request's seed comes from it.")] = 0,
        concurrency: Annotated[
            int, _option("--concurrency", panel=ASKING, help="Requests in flight over all servers.")
        ] = 64,
        batch_size: Annotated[
            int, _option("--batch-size", panel=ASKING, help="Rows decoded together, engine local.")
        ] = 64,
        timeout_s: Annotated[float, _option("--timeout-s", panel=ASKING, help="Patience with one request.")] = 600.0,
        max_retries: Annotated[int, _option("--max-retries", panel=ASKING, help="Further tries of a request.")] = 5,
        max_failure_rate: Annotated[
            float,
            _option("--max-failure-rate", panel=ASKING, help="Stop when more of the latest requests are refused."),
        ] = 0.2,
        output_dir: Annotated[
            Path | None, _option("--output-dir", panel=OUTPUT, help="New, empty, or --resume.")
        ] = None,
        shard_size: Annotated[int, _option("--shard-size", panel=OUTPUT, help="Chats a shard.")] = 1000,
        drop: Annotated[
            list[str], _option("--drop", panel=OUTPUT, metavar="FLAG", help="Leave flagged rows out. Repeatable.")
        ] = [],  # noqa: B006 (typer copies the default)
        resume: Annotated[bool, _option("--resume", panel=OUTPUT, help="Go on with what --output-dir holds.")] = False,
        dry_run: Annotated[
            bool,
            _option("--dry-run", panel=OUTPUT, help="Read, count, render one chat, meet the server; write nothing."),
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

        order = _order(dict(context.params))
        _print(standalone.rehearse(order) if dry_run else standalone.run(order), as_json, dry_run)

    return regenerate


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_alone(wrong: set[str], why: str) -> None:
    from dllm.errors import ConfigError

    if wrong:
        name = {"overrides": "set", "as_json": "json"}.get(min(wrong), min(wrong)).replace("_", "-")
        hint = "flags of the stage and of the command without a project are not mixed"
        raise ConfigError(f"--{name} {why}", where="regenerate", hint=hint)


def _order(flags: dict[str, Any]) -> "Order":
    """Turn flags into params and what goes beside them.

    Raises:
        ConfigError: a value is out of range, a flag is missing, or two do not go together.
    """
    from dllm.config.load import parse_params
    from dllm.errors import ConfigError
    from dllm.regeneration.standalone import Order
    from dllm.registry import ENGINES

    for name in ("output_dir", "model"):
        if flags[name] is None:
            raise ConfigError("missing", where=f"--{name.replace('_', '-')}")
    servers = tuple(flags["target_server"])
    engine = flags["engine"] or ("openai" if servers else "local")
    if servers and not ENGINES[engine].is_external:
        raise ConfigError(
            f"engine {engine} uses no server that is running", where="--target-server", hint="leave one of the two out"
        )
    settings = (
        *("temperature", "top_p", "max_new_tokens", "samples_per_prompt", "turns", "seed", "concurrency", "batch_size"),
        *("timeout_s", "max_retries", "max_failure_rate", "shard_size", "drop"),
    )
    source = {name: flags[flag] for name, flag in _SOURCE.items()}
    asking = {"engine": engine, **{name: flags[name] for name in settings}}
    if "served_model" in ENGINES[engine].affects:
        asking["served_model"] = flags["model"]
    elif flags["tokenizer"]:
        raise ConfigError(f"engine {engine} takes the model's own", where="--tokenizer", hint="leave it out")
    raw = {
        "recipe": "regenerate",
        "target": {"model": flags["tokenizer"] or flags["model"], "enable_thinking": REASONING[flags["reasoning"]]},
        "prepare": {"sources": [source]},
        "regenerate": asking,
        "register": {"model_name": "none"},
    }
    root = flags["root"].resolve()
    return Order(
        params=parse_params(raw, where="flags of regenerate"),
        output=(root / flags["output_dir"].expanduser()),
        root=root,
        servers=servers,
        part=_part(flags["part"]),
        heldout_fraction=flags["heldout_fraction"],
        resume=flags["resume"],
        track=bool(os.environ.get("MLFLOW_TRACKING_URI")),
    )


_SOURCE = {"name": "input_data", "split": "split", "subset": "subset", "column": "messages_column", "limit": "limit"}


def _part(text: str | None) -> tuple[int, int] | None:
    from dllm.errors import ConfigError

    if text is None:
        return None
    index, _, total = text.partition("/")
    if not (index.isdecimal() and total.isdecimal() and int(index) < int(total)):
        raise ConfigError(f"a part reads I/N with I from 0 to N - 1, got {text!r}", where="--part")
    return int(index), int(total)


def _print(found: dict[str, Any], as_json: bool, dry_run: bool) -> None:
    if as_json:
        print(json.dumps(found, ensure_ascii=False, default=str))
        return
    if not dry_run:
        return
    read = found["input"]
    refused = "".join(f", {number} refused: {reason}" for reason, number in read["refused"].items())
    print(f"{read['rows']} rows, {read['prompts']} prompts, {read['duplicates']} duplicates{refused}")
    print(f"{found['requests']} requests for {found['samples']} samples")
    if found["served"] is not None:
        print("served by " + ", ".join(f"{name} {value}" for name, value in found["served"].items()))
    print("the first prompt, as the chat template renders it:", flush=True)
    sys.stdout.write(f"{found['first_prompt']}\n")
