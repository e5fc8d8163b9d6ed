"""Run tasks on a checkpoint, alone or as one of several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm.lm_eval import measuring
from dllm.lm_eval.adapter import HarnessModel
from dllm.lm_eval.generation_arguments import parse
from dllm.lm_eval.models import load_model
from dllm.models import builtin, checkpoints
from dllm.training.distributed import Join


def run_tasks(
    checkpoint: str,
    tasks: Sequence[str],
    *,
    root: Path,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    check_greedy: bool | None = None,
    unsafe_code: bool = False,
    samples: int = 128,
    max_length: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    sampler: str | None = None,
    overrides: Sequence[str] = (),
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Return the checkpoint, what its log-likelihoods are, and the rows of results; None on ranks but the first.

    Args:
        checkpoint: as in `dllm.models.checkpoints.find`, or a built-in model.
        tasks: names of tasks, groups or tags.
        root: the project's folder.
        include_path: as in `measuring.load_tasks`, like `num_fewshot`.
        limit: documents per task; as in `measuring.measure`, like `unsafe_code`.
        check_greedy: find out whether continuations are greedy; by default where a task needs it.
        samples: as in `load_model`, like `trust_remote_code`, `sampler`, `batch_size` and `seed`.
        max_length: as in `HarnessModel`.
        revision: commit of a Hugging Face repository with code.
        overrides: KEY=VALUE of generation_kwargs.

    Raises:
        ConfigError: a task, an option or the model's own code is refused.
        ModelError: the checkpoint is missing or cannot be read.
        DataError: a text does not fit the model.
    """
    with Join() as ranks:  # first: what every rank refuses is one line
        loaded = measuring.load_tasks(tasks, include_path, num_fewshot=num_fewshot, generation=parse(overrides))
        need_greedy = measuring.greedy_tasks(loaded)
        checks = bool(need_greedy) if check_greedy is None else check_greedy
        if checkpoint.startswith(builtin.PREFIX):
            directory = builtin.directory(checkpoint)
        else:
            directory = checkpoints.find(checkpoint, root, trust_remote_code, revision)
        scored = load_model(
            directory,
            ranks.device,
            trust_remote_code=trust_remote_code,
            sampler=sampler,
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            check_greedy=checks,
        )
        model = HarnessModel(
            scored,
            batch_size=batch_size,
            seed=seed,
            max_length=max_length,
            enable_thinking=checkpoints.thinking(directory, root),
            ranks=ranks,
        )
        rows = measuring.measure(
            model,
            loaded,
            limit=limit,
            apply_chat_template=apply_chat_template,
            unsafe_code=unsafe_code,
            unchecked=set() if checks or scored.kind == "exact" else need_greedy,
        )
        record = {"checkpoint": str(directory), "likelihood": model.report(), "results": rows}
        return record if ranks.is_main else None
