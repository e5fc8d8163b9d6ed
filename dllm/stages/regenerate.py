"""regenerate: the target generates a response to every prompt, and they become the training text.

Reads `out/prepare/`; publishes parquet shards, a manifest and the rejected requests in `out/regenerate/`.
`dllm/regeneration/` generates, and resumes after a kill.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm.config.params import Params
from dllm.engines.engine import open_engine
from dllm.prompts import table as prompts
from dllm.regeneration import core, identity
from dllm.regeneration.core import Job, Regenerated
from dllm.regeneration.rollout import RolloutConfig
from dllm.responses import shards
from dllm.stages import preflight
from dllm.stages.schema import SCHEMA
from dllm.stages.workspace import Stage, open_stage

HEADLINE = ("rows", "rejected", "tokens", "tokens_per_response", "cut_share")
"""Figures of headline.json."""


def run(params: Params, root: Path) -> dict[str, Any]:
    """Generate the responses that are missing, publish all of them, and return the figures.

    Raises:
        DataError: there are no prompts, the chat template does not fit them, or the target generates no token at all.
        ModelError: the target cannot be loaded.
        ServerError: the servers are out of reach or respond wrongly.
        StageError: another process does the same, or the disk is full.
    """
    tokenizer = preflight.check(params, reports=False)  # prepare has
    prepared = root / "out" / "prepare"
    inputs = prompts.read_prompts(prepared)
    with open_stage(
        "regenerate",
        params,
        sections=[params.target, identity.determining(params.regenerate)],
        inputs={"prompts": prepared / prompts.FILE},
        identity=identity.identity(params.regenerate, params.target, tokenizer),
        root=root,
    ) as stage:
        made_of = {**stage.record["identity"], "schema": SCHEMA["regenerate"]}
        config = RolloutConfig(params.regenerate, params.target, tokenizer)
        job = Job(
            config=config,
            prompts=lambda: inputs,
            turns=sum(core.num_turns(prompt, config) for prompt in inputs),
            work=stage.work,
            open_engine=lambda: open_engine(params, tokenizer, stage.root),
            tracker=stage.tracker,
            save_seconds=stage.save_seconds,
            settings=identity.settings_digest(params.regenerate, params.target, made_of),
        )
        return _publish(stage, len(inputs), core.regenerate(job))


def _publish(stage: Stage, num_prompts: int, regenerated: Regenerated) -> dict[str, Any]:
    settings, target = stage.params.regenerate, stage.params.target
    counts = regenerated.counts.to_json()
    if regenerated.counts.tokens_by_split[prompts.TRAIN] == 0:
        raise core.no_tokens(regenerated, num_prompts, f"target.model: {target.model}")
    manifest = {
        "schema": shards.SCHEMA,
        **stage.record["identity"],
        **identity.about(settings, target),
        "inputs": stage.digests,
        **counts,
        "shards": regenerated.entries,
    }
    metrics = {"prompts": num_prompts, **counts, **regenerated.counts.lengths(), **regenerated.pace}
    stage.record["served"] = regenerated.served
    headline = {name: metrics[name] for name in HEADLINE}
    stage.publish(core.write_records(regenerated, manifest), metrics, headline=headline)
    core.remove_others(regenerated)
    print(f"regenerate: {core.summary(regenerated)}", flush=True)
    return metrics
