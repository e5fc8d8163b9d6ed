"""regenerate: the target answers every prompt, and its own words become the training text.

Reads `out/prepare/`; leaves parquet shards and a manifest in `out/regenerate/`. Answers are journalled as they finish
and published in order of prompt and sample, so neither a kill nor the order of finishing shows in the rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.config import Params, Regenerate
from dllm.data import chat, prompts, shards
from dllm.data.prompts import Prompt
from dllm.data.shards import Row
from dllm.errors import DataError, StageError
from dllm.models import targets
from dllm.progress import Progress
from dllm.serving import openai_engine
from dllm.serving.engine import Engine, Request, request_key, request_origin, request_seed
from dllm.serving.journal import Journal
from dllm.stages.contract import Stage, open_stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JOURNAL = "answers.jsonl"
TRACK_EVERY_S = 10.0


def run(params: Params, root: Path) -> dict[str, Any]:
    """Answer what is not yet answered, publish all of it, and return the figures.

    Raises:
        DataError: there are no prompts, the chat template does not fit them, or the target says nothing at all.
        ModelError: the target cannot be loaded.
        ServerError: the server of engine `openai` is out of reach or answers wrongly.
        StageError: another process does the same, or the disk is full.
    """
    prepared = root / "out" / "prepare"
    asked = prompts.read_prompts(prepared)
    tokenizer = targets.load_tokenizer(params.target)
    with open_stage(
        "regenerate",
        params,
        sections=[params.target, determining(params.regenerate)],
        inputs={"prompts": prepared / prompts.FILE},
        identity=_identity(params, tokenizer),
        root=root,
    ) as stage:
        requests = build_requests(asked, params, tokenizer)
        with Journal(stage.work / JOURNAL) as journal:
            pace = _answer_missing(stage, requests, journal, tokenizer)
            return _publish(stage, asked, _rows(asked, requests, journal), pace)


def determining(settings: Regenerate) -> Regenerate:
    """Put aside the settings that shape no answer, so that work goes on after one of them changes."""
    defaults = Regenerate()
    machine = ("base_url", "concurrency", "timeout_s", "max_retries")
    return settings.model_copy(update={name: getattr(defaults, name) for name in machine})


def build_requests(asked: Sequence[Prompt], params: Params, tokenizer: PreTrainedTokenizerBase) -> list[Request]:
    """Make one request for every sample of every prompt; held-out prompts are answered once.

    Raises:
        DataError: the chat template does not fit a prompt; it names the prompt.
    """
    settings = params.regenerate
    requests = []
    for prompt in asked:
        try:
            ids = tuple(chat.prompt_ids(tokenizer, prompt.messages, params.target.enable_thinking))
        except DataError as error:
            raise DataError(f"prompt {prompt.id}: {error.message}", where=error.where, hint=error.hint) from None
        for sample in range(settings.samples_per_prompt if prompt.split == prompts.TRAIN else 1):
            requests.append(
                Request(
                    key=request_key(prompt.id, sample),
                    prompt_ids=ids,
                    messages=prompt.messages,
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    seed=request_seed(settings.seed, prompt.id, sample),
                )
            )
    return requests


def _identity(params: Params, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    found = {"engine": params.regenerate.engine, "template": chat.template_digest(tokenizer)}
    if params.regenerate.engine == "local":
        return {**found, "target": targets.identity(params.target)}
    # The weights lie with the server, and need not be here.
    named = {"model": params.target.model, "revision": params.target.revision}
    return {**found, "target": named, "served_model": openai_engine.served_model(params.regenerate, params.target)}


def _engine(params: Params, tokenizer: PreTrainedTokenizerBase) -> Engine:
    if params.regenerate.engine == "openai":
        return openai_engine.OpenAIEngine(params.regenerate, params.target, tokenizer)
    from dllm.serving.local import LocalEngine

    model = targets.load_target(params.target)
    stops = targets.stop_ids(model, tokenizer) | chat.stop_ids(tokenizer, model.generation_config)
    return LocalEngine(model, tokenizer, stops, params.regenerate.batch_size)


def _answer_missing(
    stage: Stage, requests: Sequence[Request], journal: Journal, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Ask for every answer the journal lacks; return how many were asked for, the seconds it took, and the pace."""
    missing = [request for request in requests if request.key not in journal]
    done = len(requests) - len(missing)
    if done:
        print(f"regenerate: {done} of {len(requests)} answers are there already", flush=True)
    if not missing:
        return {"asked": 0, "seconds": 0.0, "tokens_per_s": 0.0}
    engine = _engine(stage.params, tokenizer)
    before, tokens_per_s = journal.num_tokens, 0.0
    began = tracked = time.monotonic()
    with Progress("regenerate", total=len(requests), unit="answers", initial=done) as progress:
        for answer in engine.answer(missing):
            journal.append(answer)
            done += 1
            now = time.monotonic()
            tokens = journal.num_tokens - before
            tokens_per_s = round(tokens / max(now - began, 1e-3), 1)
            progress.update(1, tokens=tokens, tokens_per_s=tokens_per_s)
            if now - tracked > TRACK_EVERY_S:
                tracked = now
                stage.tracker.log_metrics({"answers": done, "tokens_per_s": tokens_per_s}, step=done)
    return {"asked": len(missing), "seconds": round(time.monotonic() - began, 3), "tokens_per_s": tokens_per_s}


def _rows(asked: Sequence[Prompt], requests: Sequence[Request], journal: Journal) -> Iterator[Row]:
    by_id = {prompt.id: prompt for prompt in asked}
    for request in sorted(requests, key=lambda request: request_origin(request.key)):
        if request.key not in journal:
            raise StageError("the engine left a prompt unanswered", where=request.key, hint="run this again")
        id, sample = request_origin(request.key)
        answer = journal.read(request.key)
        yield Row(
            prompt_id=id,
            sample=sample,
            source=by_id[id].source,
            split=by_id[id].split,
            messages=[*by_id[id].messages, {"role": "assistant", "content": answer.text}],
            prompt_ids=list(request.prompt_ids),
            answer_ids=list(answer.token_ids),
            finish_reason=answer.finish_reason,
            num_tokens=len(answer.token_ids),
        )


def _publish(stage: Stage, asked: Sequence[Prompt], rows: Iterator[Row], pace: dict[str, float]) -> dict[str, Any]:
    settings = stage.params.regenerate
    folder = stage.work / "shards"
    folder.mkdir(exist_ok=True)
    sampling = settings.model_dump(include={"samples_per_prompt", "temperature", "top_p", "max_new_tokens", "seed"})
    about = {**stage.record["identity"], "sampling": sampling, "inputs": stage.digests}
    manifest = shards.write_rows(rows, folder, settings.shard_size, about)
    if manifest["tokens_by_split"][prompts.TRAIN] == 0:
        raise DataError(
            f"the target's answers to {len(asked)} prompts hold no token to train on",
            where=f"target.model: {stage.params.target.model}",
            hint="look at the chat template and the stop ids",
        )
    names = [entry["file"] for entry in manifest["shards"]] + [shards.MANIFEST]
    counted = ("rows", "tokens", "tokens_by_split", "empty_answers", "finish_reasons", "splits", "sources")
    metrics = {"prompts": len(asked), **{name: manifest[name] for name in counted}, **pace}
    stage.publish({name: folder / name for name in names}, metrics)
    reasons = ", ".join(f"{count} {reason}" for reason, count in manifest["finish_reasons"].items())
    print(f"regenerate: {manifest['rows']} rows, {manifest['tokens']} tokens ({reasons})", flush=True)
    return metrics
