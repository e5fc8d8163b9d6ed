"""`python -m dllm lm-eval`: tasks of lm-evaluation-harness on a checkpoint, and what it prints."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.config.params import Target
from dllm.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

    from dllm.decoding.diffusion import Sampler
    from dllm.lm_eval.models import Scored

KINDS = {
    "exact": "log-likelihoods are exact: token by token, with the causal mask",
    "bound": "log-likelihoods are lower bounds, averaged over masks",
    "block bound": "log-likelihoods are lower bounds, block after block, averaged over masks",
}


def run(
    *,
    checkpoint: str,
    tasks: Sequence[str],
    include_path: Path | None,
    root: Path,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    samples: int = 128,
    seed: int = 0,
    max_length: int | None = None,
    apply_chat_template: bool = False,
    check_greedy: bool | None = None,
    confirm_run_unsafe_code: bool = False,
    sampler: Sampler | None = None,
    generation: Sequence[str] = (),
    as_json: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> None:
    """Run tasks on a checkpoint and print a table, or one JSON object; under torchrun ranks share the documents.

    Args:
        check_greedy: find out whether answers are greedy ones; null does so where a task asks.
        confirm_run_unsafe_code: let tasks run what the model writes.
        generation: KEY=VALUE pairs that go before the tasks' generation_kwargs.

    Raises:
        ConfigError: lm-eval is missing, a task or an argument is unknown.
        ModelError: the checkpoint is missing, or a draft.
        DataError: a document does not fit the model.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is not installed", hint="pip install 'dllm[lm-eval]'")
    named = _named(generation)
    # Else the harness forks once a core to resample some numbers, and draws bars beside ours.
    for name in ("DISABLE_MULTIPROC", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    from dllm.cli import generate as answers
    from dllm.lm_eval import measuring
    from dllm.lm_eval.adapter import HarnessModel
    from dllm.models import builtin
    from dllm.training.distributed import Join

    loaded = measuring.load_tasks(tasks, include_path, num_fewshot=num_fewshot, generation=named)
    asking = measuring.ask_if_greedy(loaded)
    checks = bool(asking) if check_greedy is None else check_greedy
    with Join() as ranks:
        if checkpoint.startswith(builtin.PREFIX):
            folder = builtin.directory(checkpoint)
        else:
            folder = answers.find(checkpoint, root, trust_remote_code, revision)
        model = HarnessModel(
            _model(folder, ranks.device, trust_remote_code, batch_size, samples, seed, checks, sampler),
            batch_size=batch_size,
            seed=seed,
            max_length=max_length,
            enable_thinking=answers.thinking(folder, root),
            ranks=ranks,
        )
        rows = measuring.measure(
            model,
            loaded,
            limit=limit,
            apply_chat_template=apply_chat_template,
            unsafe_code=confirm_run_unsafe_code,
            unchecked=set() if checks or model.model.kind == "exact" else asking,
        )
        record = {"checkpoint": str(folder), "likelihood": model.report(), "results": rows}
        if ranks.is_main:
            print(json.dumps(record)) if as_json else _show(record)


def _model(
    folder: Path,
    device: torch.device,
    trust_remote_code: bool,
    batch_size: int,
    samples: int,
    seed: int,
    check_greedy: bool,
    sampler: Sampler | None,
) -> Scored:
    """Load a diffusion model, or an ordinary causal one."""
    import torch

    from dllm.lm_eval.models import CausalScores, DiffusionScores
    from dllm.models import checkpoints, targets
    from dllm.models.diffusion.bidirectional import BidirectionalLM, load_bidirectional, read_note
    from dllm.models.diffusion.remote import kind_at, needs_its_code

    target = Target(model=str(folder), trust_remote_code=trust_remote_code)
    # On a processor bfloat16 is no faster, and near ties would fall differently from batch to batch.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    note, kind = read_note(folder), kind_at(folder)
    if note is None and kind is None:
        if checkpoints.is_draft(folder):
            raise ModelError("a draft says nothing of its own", where=str(folder), hint="name its target")
        if sampler is not None:
            raise ConfigError(f"sampler {sampler} is for diffusion models", where=str(folder))
        model = targets.load_target(target, dtype, device)
        return CausalScores(model, targets.load_tokenizer(target), batch_size=batch_size)
    if needs_its_code(folder) and not trust_remote_code:
        raise ConfigError(
            "this model runs code of its own", where=str(folder), hint="read it, then give --trust-remote-code"
        )
    size = note.block_size if note is not None else kind.block_size if kind is not None else None

    def load(to_score: bool) -> BidirectionalLM:
        return load_bidirectional(target, dtype, device, paired=size if to_score else None)

    return DiffusionScores(
        load, samples=samples, batch_size=batch_size, seed=seed, check_greedy=check_greedy, sampler=sampler
    )


def _named(pairs: Sequence[str]) -> dict[str, Any]:
    from dllm.config.load import read_yaml

    named = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"expected KEY=VALUE, not {pair!r}", where="--gen")
        try:
            named[name] = read_yaml(value)
        except ValueError:
            raise ConfigError(f"no value: {value!r}", where=f"--gen {name}") from None
    return named


def _show(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

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
