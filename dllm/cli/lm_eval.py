"""The verb `lm-eval`: tasks of lm-evaluation-harness on a checkpoint, and how results are printed."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from dllm.cli.options import (
    DECODING,
    MODEL,
    OUTPUT,
    TASKS,
    Debug,
    Revision,
    Root,
    TrustRemoteCode,
    option,
    sampler_option,
)
from dllm.errors import ConfigError
from dllm.training import launch

KINDS = {
    "exact": "log-likelihoods are exact: token by token, with the causal mask",
    "bound": "log-likelihoods are lower bounds, averaged over masks",
    "block bound": "log-likelihoods are lower bounds, block after block, averaged over masks",
}


def run(
    checkpoint: Annotated[str, option(panel=MODEL, help="As for generate, or builtin:NAME; plain causal models too.")],
    tasks: Annotated[str, option(panel=TASKS, metavar="NAME[,NAME]", help="Tasks, groups or tags.")],
    include_path: Annotated[
        Path | None, option(panel=TASKS, help="Folder of task files; by default the harness's own tasks, off the hub.")
    ] = None,
    limit: Annotated[int | None, option(panel=TASKS, min=1, help="Documents per task: the first ones.")] = None,
    num_fewshot: Annotated[int | None, option(panel=TASKS, min=0, help="Examples before each question.")] = None,
    apply_chat_template: Annotated[
        bool, option("--apply-chat-template", panel=TASKS, help="Render requests as chats.")
    ] = False,
    check_greedy: Annotated[
        bool | None,
        option(
            "--check-greedy/--no-check-greedy",
            panel=TASKS,
            help="Also decode, to tell whether a continuation is the greedy one; by default where a task needs it.",
        ),
    ] = None,
    confirm_run_unsafe_code: Annotated[
        bool, option("--confirm-run-unsafe-code", panel=TASKS, help="Allow tasks to execute generated code.")
    ] = False,
    samples: Annotated[
        int, option(panel=TASKS, min=2, help="Masks per continuation, where its likelihood is a bound.")
    ] = 128,
    max_length: Annotated[
        int | None, option(panel=MODEL, min=2, help="Most tokens of a text; at most the model's.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    sampler: Annotated[str | None, sampler_option({"diffusion"})] = None,
    gen: Annotated[
        list[str],
        option(
            panel=DECODING,
            metavar="KEY=VALUE",
            help="Overrides a task's generation_kwargs, e.g. steps=32: any setting of the sampler. Repeatable.",
        ),
    ] = [],  # noqa: B006
    batch_size: Annotated[int, option(panel=DECODING, min=1, help="Rows per forward pass.")] = 8,
    seed: Annotated[int, option(panel=DECODING, help="Random seed of masks and of sampling.")] = 0,
    nproc: Annotated[int, option(panel=DECODING, min=1, max=256, help="Processes that share the documents.")] = 1,
    as_json: Annotated[bool, option("--json", panel=OUTPUT, help="Print one JSON object.")] = False,
    root: Root = Path(),
    debug: Debug = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a checkpoint; print a table, and whether its likelihoods are exact."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is not installed", hint="pip install 'dllm[lm-eval]'")
    if nproc > 1 and not launch.is_rank():
        raise SystemExit(launch.run(sys.orig_argv, nproc, named_by="--nproc"))  # the ranks run this very command
    # Otherwise the harness forks a process per core to resample, and draws its own progress bars.
    for name in ("DISABLE_MULTIPROC", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    from dllm.lm_eval.run import run_tasks

    record = run_tasks(
        checkpoint,
        [name.strip() for name in tasks.split(",") if name.strip()],
        root=root.resolve(),
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        check_greedy=check_greedy,
        unsafe_code=confirm_run_unsafe_code,
        samples=samples,
        max_length=max_length,
        trust_remote_code=trust_remote_code,
        revision=revision,
        sampler=sampler,
        overrides=gen,
        batch_size=batch_size,
        seed=seed,
    )
    if record is not None:
        print(json.dumps(record)) if as_json else _show(record)


def _show(record: dict[str, Any]) -> None:
    table = Table(title=record["checkpoint"], title_justify="left")
    for column in ("task", "shots", "documents", "filter", "metric", "", "value", "± stderr"):
        table.add_column(column, justify="right" if column in ("shots", "documents", "value", "± stderr") else "left")
    for row in record["results"]:
        better = {True: "↑", False: "↓"}.get(row["higher_is_better"], "")
        figures = [
            ("–" if name == "value" else "") if row[name] is None else f"{row[name]:.4f}"
            for name in ("value", "stderr")
        ]
        named = [str(row[name]) for name in ("task", "shots", "documents", "filter", "metric")]
        table.add_row(*named, better, *figures)
    console = Console(soft_wrap=True, width=160)
    console.print(table)
    found = record["likelihood"]
    if found["scored"]:
        line = KINDS[found["kind"]]
        if "mean_error" in found:
            line += (
                f" ({found['samples']} each; {found['all_masks_taken']:.0%} had no more, and those are exact; "
                f"mean standard error {found['mean_error']:.3f} nats)"
            )
        console.print(line)
