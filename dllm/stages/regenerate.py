"""regenerate: the target answers every prompt, and its own words become the training text.

Reads `out/prepare/`; leaves parquet shards, a manifest and the refused requests in `out/regenerate/`. How answers come
about and survive a kill is the business of `dllm/regeneration/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.config.params import Params
from dllm.errors import DataError
from dllm.files import atomic_write
from dllm.models import targets
from dllm.prompts import table as prompts
from dllm.prompts.table import Prompt
from dllm.regeneration import core as answering
from dllm.regeneration import engines, identity
from dllm.regeneration.core import Answered, Job
from dllm.regeneration.rollout import RolloutConfig
from dllm.responses import shards
from dllm.stages.workspace import Stage, open_stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(params: Params, root: Path) -> dict[str, Any]:
    """Answer what is not yet answered, publish all of it, and return the figures.

    Raises:
        DataError: there are no prompts, the chat template does not fit them, or the target says nothing at all.
        ModelError: the target cannot be loaded.
        ServerError: the servers are out of reach or answer wrongly.
        StageError: another process does the same, or the disk is full.
    """
    prepared = root / "out" / "prepare"
    asked = prompts.read_prompts(prepared)
    tokenizer = targets.load_tokenizer(params.target)
    with open_stage(
        "regenerate",
        params,
        sections=[params.target, identity.determining(params.regenerate)],
        inputs={"prompts": prepared / prompts.FILE},
        identity=identity.identity(params.regenerate, params.target, tokenizer),
        root=root,
    ) as stage:
        answered = answering.answer_all(_job(stage, asked, tokenizer))
        return _publish(stage, len(asked), answered)


def _job(stage: Stage, asked: list[Prompt], tokenizer: PreTrainedTokenizerBase) -> Job:
    asking = RolloutConfig(stage.params.regenerate, stage.params.target, tokenizer)
    return Job(
        asking=asking,
        prompts=lambda: asked,
        turns=sum(answering.num_turns(prompt, asking) for prompt in asked),
        work=stage.work,
        open_engine=lambda: engines.opened(stage.params, tokenizer, stage.root),
        tracker=stage.tracker,
    )


def _publish(stage: Stage, num_prompts: int, answered: Answered) -> dict[str, Any]:
    counts = answered.counts.to_json()
    if answered.counts.tokens_by_split[prompts.TRAIN] == 0:
        raise DataError(
            f"the target's answers to {num_prompts} prompts hold no token to train on",
            where=f"target.model: {stage.params.target.model}",
            hint="look at the chat template and the stop ids" + answering.first_rejection(answered),
        )
    about = {
        **stage.record["identity"],
        **identity.about(stage.params.regenerate, stage.params.target),
        "inputs": stage.digests,
    }
    folder = answered.store.folder
    manifest = {"schema": shards.SCHEMA, **about, **counts, "shards": answered.entries}
    shards.write_manifest(folder, manifest)
    atomic_write(folder / shards.REJECTED, answering.rejections(answered))
    names = [*(entry["file"] for entry in answered.entries), shards.MANIFEST, shards.REJECTED]
    metrics = {"prompts": num_prompts, **counts, **answered.pace}
    stage.record["served"] = answered.served
    stage.publish({name: folder / name for name in names}, metrics)
    answering.forget_others(answered)
    print(f"regenerate: {answering.summary(answered)}", flush=True)
    return metrics
