"""The Prefect flow `regenerate-parts`: the prompts of one input in parts, each a flow run of its own, then one folder.

A part holds the prompts whose id falls to it, so parts need no list and no order, and each goes on where it was. They
lie beside the result, in `OUTPUT_DIR.parts/`. Joining them only links shards and adds counts.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, cast
from uuid import UUID

import httpx
from prefect import flow, get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from pydantic import AfterValidator, Field, PositiveInt

from dllm.errors import ConfigError, StageError
from dllm.process import signals
from flows.artifacts import ProgressBar
from flows.children import HERE, ROOT, WHEN_A_SERVER_IS_BACK, run_verb
from flows.computes import engine_computes
from flows.gpu_slots import gpu_slot
from flows.in_process import run
from flows.parameters import NO_SECRET, check_open

OURS = ("--input-data", "--output-dir", "--part", "--resume", "--dry-run")
"""What the flow itself says to `dllm regenerate`."""
LOOK_EVERY_S = 3.0


@task(name="regenerate", cache_policy=NO_CACHE, **WHEN_A_SERVER_IS_BACK)
def answer(input_data: str, output_dir: str, part: int, parts: int, options: str) -> None:
    """Answer one part's prompts, again where a server was out of reach: finished answers are kept."""
    words = ["--input-data", input_data, "--output-dir", str(_folder(output_dir, part, parts))]
    words += ["--part", f"{part}/{parts}", "--resume", *_split(options)]
    with gpu_slot(lambda: engine_computes(_engine(options))):
        run_verb(HERE, "regenerate", *words, name=f"regenerate-{part}-of-{parts}")


@task(name="merge", cache_policy=NO_CACHE)
def merge(output_dir: str, parts: int) -> None:
    """Join the parts, which rewrites no row."""
    folders = [str(_folder(output_dir, part, parts)) for part in range(parts)]
    run_verb(HERE, "data", "merge", *folders, "--output-dir", output_dir, name="merge")


@task(name="verify", cache_policy=NO_CACHE)
def verify(output_dir: str) -> None:
    """Check every hash, count and row of the result."""
    run_verb(HERE, "data", "verify", output_dir, name="verify")


Text = Annotated[str, AfterValidator(check_open), Field(json_schema_extra=NO_SECRET)]
"""A parameter that Prefect's database keeps; its server refuses one that holds a secret before it does."""


@flow(name="regenerate-part")
def regenerate_part(input_data: Text, output_dir: Text, part: int, parts: PositiveInt, options: Text = "") -> None:
    """Answer the prompts of one part, or what is missing of them.

    Args:
        input_data: what `dllm regenerate --input-data` takes.
        output_dir: where the result of all parts will be; this part goes into `OUTPUT_DIR.parts/`.
        part: number of the part, from 0.
        parts: how many there are.
        options: further options of `dllm regenerate`, as on its command line.
    """
    answer(input_data, output_dir, part, parts, options)


@flow(name="regenerate-parts")
def regenerate_parts(
    input_data: Text, output_dir: Text, parts: PositiveInt, options: Text = "", deployment: str | None = None
) -> None:
    """Answer all prompts in parts, join the parts, and check the result.

    Args:
        input_data: what `dllm regenerate --input-data` takes.
        output_dir: folder of the result. Relative ones lie in the project's folder; workers on other machines need a
            path that all of them reach.
        parts: how many there are.
        options: further options of `dllm regenerate`, as on its command line: "--model NAME --temperature 0".
        deployment: deployment of `regenerate-part`, whose work pool takes the parts; None takes them one after the
            other in this process.
    """
    _split(options)
    if deployment is None:
        for part in range(parts):
            answer(input_data, output_dir, part, parts, options)
    else:
        given = {"input_data": input_data, "output_dir": output_dir, "parts": parts, "options": options}
        runs: dict[int, UUID] = {}
        try:
            for part in range(parts):
                runs[part] = _start(deployment, {**given, "part": part})
            _wait(runs)
        except BaseException:  # cancelled too: what this run has started ends with it
            _cancel(runs)
            raise
    merge(output_dir, parts)
    verify(output_dir)
    folder = str(ROOT / output_dir)
    emit_event(
        "regenerate-parts.finished", {"prefect.resource.id": f"dllm.responses.{folder}"}, payload={"folder": folder}
    )


def _split(options: str) -> list[str]:
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise ConfigError(f"cannot be split into words: {error}", where="options") from None
    if wrong := [word for word in words if word.split("=")[0] in OURS]:
        raise ConfigError(f"{wrong[0]} is the flow's to say", where="options", hint="leave it out")
    return words


def _engine(options: str) -> str:
    """Return the engine that `dllm regenerate` takes with these options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--engine", nargs="?")  # one without a value is the command's to refuse
    parser.add_argument("--target-server", nargs="?")
    known, _ = parser.parse_known_args(_split(options))
    return known.engine or ("openai" if known.target_server else "local")


def _folder(output_dir: str, part: int, parts: int) -> Path:
    return Path(f"{output_dir.rstrip('/')}.parts", f"{part}-of-{parts}")


def _start(deployment: str, parameters: Mapping[str, object]) -> UUID:
    name = f"part {parameters['part']} of {parameters['parts']}"
    try:
        started = run_deployment(deployment, parameters=dict(parameters), timeout=0, flow_run_name=name)
    except ObjectNotFound:
        hint = "`prefect deployment ls` names those there are; `make serve` makes regenerate-part/local"
        raise ConfigError("no such deployment", where=deployment, hint=hint) from None
    return cast(FlowRun, started).id


def _wait(runs: Mapping[int, UUID]) -> None:
    """Wait until every part's run has ended.

    Raises:
        StageError: at least one has not completed; what the first one said is in the message.
    """
    bar, said = ProgressBar("regenerate-parts-progress"), ""
    states: dict[int, State | None] = dict.fromkeys(runs)
    while True:
        states |= {part: _state(runs[part]) for part, state in states.items() if state is None or not state.is_final()}
        ended = {part: state for part, state in states.items() if state is not None and state.is_final()}
        line = f"regenerate-parts: {len(ended)}/{len(runs)} parts ended  {_count(states)}"
        if line != said:
            print(line, flush=True)
            said = line
        bar.show(line)
        if len(ended) == len(runs):
            break
        signals.sleep(LOOK_EVERY_S)
    bar.catch_up()
    if failed := {part: state for part, state in ended.items() if not state.is_completed()}:
        part, state = next(iter(failed.items()))
        said = (state.message or "no reason given").removeprefix("Flow run encountered an exception: ")
        reason = " ".join(f"{state.name}: {said}".split())
        hint = "run it again: finished answers are kept"
        raise StageError(f"{len(failed)} of {len(runs)} parts failed; part {part}: {reason}", hint=hint)


def _state(part: UUID) -> State | None:
    """Ask for the state of a part's run; None where the server does not answer."""
    with get_client(sync_client=True) as client:
        try:
            return client.read_flow_run(part).state
        except ObjectNotFound:
            return State(type=StateType.CRASHED, name="Gone", message="somebody deleted its run")
        except httpx.HTTPError:
            return None


def _count(states: Mapping[int, State | None]) -> str:
    counts = Counter("out of sight" if state is None else state.name or state.type.value for state in states.values())
    return ", ".join(f"{count} {name.lower()}" for name, count in sorted(counts.items()))


def _cancel(runs: Mapping[int, UUID]) -> None:
    with get_client(sync_client=True) as client:
        for part in runs.values():
            with contextlib.suppress(httpx.HTTPError, ObjectNotFound):
                state = client.read_flow_run(part).state
                if state is None or not state.is_final():
                    client.set_flow_run_state(part, State(type=StateType.CANCELLING))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.regenerate_parts",
        description="Regenerate in parts, join them, and check the result. Other options go to `dllm regenerate`.",
        allow_abbrev=False,
    )
    parser.add_argument("--input-data", required=True)
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--parts", type=_positive, required=True, metavar="N")
    parser.add_argument(
        "--deployment", help="of regenerate-part, whose pool takes the parts; otherwise one by one here"
    )
    known, rest = parser.parse_known_args(arguments)
    for text in arguments:
        try:
            check_open(text)
        except ValueError as error:
            parser.error(str(error))
    return run(regenerate_parts, **vars(known), options=shlex.join(rest))


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
