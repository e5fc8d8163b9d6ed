"""Evaluation of a draft: acceptance length and speedup of speculative decoding on held-out prompts.

Each prompt is decoded autoregressively and speculatively, one directly after the other in one process and in
alternating order, so that drift of the machine affects both. A few prompts are decoded again in float32, where both
must give the same ids, and the walk over them the same rounds. Acceptance is counted on more prompts than are decoded,
by the walk alone, and on all of them where the target cannot take tokens back.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from dllm.config.params import Params
from dllm.decoding import throughput
from dllm.decoding.acceptance import Acceptance
from dllm.decoding.comparison import Comparison, Pair, figures, table
from dllm.decoding.speculative import Decoder
from dllm.digests import read_sealed, sealed
from dllm.errors import DataError
from dllm.files import atomic_write
from dllm.methods.dflash import curve, samples
from dllm.methods.dflash import sets as prompt_sets
from dllm.methods.dflash.abilities import check_evaluation
from dllm.methods.dflash.sampled import sampled_figures
from dllm.methods.dflash.sets import MeasuredSet, Question
from dllm.methods.dflash.settings import Throughput, Walk
from dllm.methods.dflash.walked import differing_round, walked_figures
from dllm.methods.method import EvaluateContext, Evaluation
from dllm.models import targets
from dllm.models.drafts.checkpoint import load_draft
from dllm.models.precision import name_of, note
from dllm.progress import Progress
from dllm.prompts import template as chat
from dllm.prompts.table import HELDOUT, read_prompts

WARM_UP_TOKENS = 16
HEADLINE = ("tau_micro", "speedup", "tokens_per_s_ar", "tokens_per_s_spec", "identical_fraction", "greedy_identical")
"""Figures of headline.json; the walk, where there was one, has counted its tau_micro on more prompts."""
SECTION, SECTION_OF_METRICS = "walk", "walked"
NO_DECODING = (
    "this target keeps a recurrent state, and decoding with a draft has to take back rejected tokens; acceptance is "
    "counted on its greedy responses, without decoding, and no speed is measured"
)


def evaluate(ctx: EvaluateContext) -> Evaluation:
    """Measure the trained draft.

    Raises:
        DataError: there is no held-out prompt that fits the target, or a prompt set cannot be read.
        ModelError: the target or the draft is missing, or they do not fit each other.
    """
    params = ctx.params
    comparison = _load(ctx)
    speculative = comparison.speculative
    if line := note(params.target.dtype, speculative.model.device):
        print(f"evaluate: {line}", file=sys.stderr, flush=True)
    tokenizer = targets.load_tokenizer(params.target)
    configs = (speculative.model.generation_config, speculative.model.config.get_text_config())
    stop_ids = chat.stop_ids(tokenizer, *configs)
    settings: Walk = getattr(params.evaluate, SECTION, None) or Walk()
    questions, excluded = _questions(params, ctx.root, tokenizer, speculative.limit, params.evaluate.num_prompts)
    many = _questions(params, ctx.root, tokenizer, speculative.limit, settings.prompts)[0] if settings.prompts else []
    number = settings.prompts or params.evaluate.num_prompts
    measured = prompt_sets.load(params, ctx.root, tokenizer, speculative.limit, number)
    can_decode = DynamicCache(config=speculative.model.config).is_croppable
    if not can_decode:
        check_evaluation("none", params.evaluate, where=f"target.model: {params.target.model}")
        print(f"evaluate: {NO_DECODING}", file=sys.stderr, flush=True)
        questions = []
    draft, device, dtype = speculative.draft, speculative.model.device, speculative.model.dtype
    assert draft is not None
    parts = ctx.work / "prompts"
    with speculative.packed():  # both ways of decoding gain from it
        pairs = _compare(params, parts, comparison, questions, stop_ids)
        sampled = {}
        if params.evaluate.temperature and questions:
            sampled["sampled"] = sampled_figures(speculative, params.evaluate, questions, stop_ids, parts)
    walked = {SECTION_OF_METRICS: walked_figures(ctx, speculative, many, stop_ids, pairs)} if many else {}
    sets = {"sets": _of_sets(ctx, speculative, measured, stop_ids, parts, can_decode)} if measured else {}
    acceptance = walked.get(SECTION_OF_METRICS) or figures(pairs, speculative.block_size)
    paying = {"throughput": _throughput(params, speculative, questions, acceptance)} if can_decode else {}
    paying = {name: found for name, found in paying.items() if found}
    metrics = {
        **figures(pairs, speculative.block_size),
        "by_source": {
            source: figures([p for p in pairs if p.source == source], speculative.block_size)
            for source in sorted({p.source for p in pairs})
        },
        **sampled,
        **walked,
        **sets,
        **paying,
        **({} if can_decode else {"decoding": NO_DECODING}),
        "block_size": speculative.block_size,
        "draft_params": sum(parameter.numel() for parameter in draft.parameters()),
        "draft_layers": draft.config.num_hidden_layers,
        **excluded,
        "heldout_digest": _heldout_digest(questions, many, params.evaluate.max_new_tokens),
        "dtype": name_of(dtype),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    del comparison, speculative, draft  # the float32 target needs the memory
    metrics |= _check_identity(ctx, questions[: params.evaluate.identity_prompts], stop_ids)
    samples.write(ctx.work / samples.FILE, tokenizer, questions, pairs)
    return _write(ctx, pairs, metrics, scratch=parts)


def _load(ctx: EvaluateContext, dtype: str | None = None) -> Comparison:
    model = targets.load_target(ctx.params.target, dtype)
    draft = load_draft(ctx.checkpoint, model.config).to(model.device, model.dtype)
    return Comparison(Decoder(model), Decoder(model, draft, ctx.params.evaluate.block_size))


def _questions(
    params: Params, root: Path, tokenizer: Any, limit: int, number: int
) -> tuple[list[Question], dict[str, int]]:
    """Take the first `number` held-out prompts of each source by id; count those that leave no room for a response, or
    that the chat template refuses."""
    taken: dict[str, list[Question]] = {}
    excluded = {"prompts_too_long": 0, "prompts_refused": 0}
    refusal: DataError | None = None
    for prompt in read_prompts(root / "out" / "prepare", HELDOUT):
        same_source = taken.setdefault(prompt.source, [])
        if len(same_source) == number:
            continue
        try:
            ids = chat.prompt_ids(tokenizer, prompt.messages, params.target.enable_thinking, tools=prompt.tools)
        except DataError as error:  # regenerate has excluded it, too
            refusal, excluded["prompts_refused"] = error, excluded["prompts_refused"] + 1
            continue
        if len(ids) >= limit:
            excluded["prompts_too_long"] += 1
        else:
            same_source.append(Question(prompt.id, prompt.source, tuple(ids)))
    questions = sorted((q for same_source in taken.values() for q in same_source), key=lambda q: q.id)
    if refusal and not questions:
        raise refusal
    if not questions:
        long = excluded["prompts_too_long"]
        raise DataError(
            "no held-out prompt to evaluate on",
            where=str(root / "out" / "prepare"),
            hint=f"{long} were longer than the target's {limit} positions; raise prepare.heldout_fraction",
        )
    return questions, excluded


def _of_sets(
    ctx: EvaluateContext,
    decoder: Decoder,
    measured: Sequence[MeasuredSet],
    stop_ids: set[int],
    parts: Path,
    can_decode: bool,
) -> dict[str, Any]:
    """Return the acceptance on each set, by the walk and where asked by sampling, and published figures beside it."""
    settings = ctx.params.evaluate
    questions = [question for each in measured for question in each.questions]
    walked = walked_figures(ctx, decoder, questions, stop_ids, [])["by_source"]
    found: dict[str, Any] = {}
    for each in measured:
        beside = prompt_sets.published(each, ctx.params, decoder)
        found[each.name] = {**walked[f"set {each.name}"], **each.record, "published": beside}
    if settings.temperature and can_decode:
        with decoder.packed():
            for each in measured:
                sampled = sampled_figures(decoder, settings, each.questions, stop_ids, parts)
                beside = prompt_sets.published(each, ctx.params, decoder, sampled=True)
                found[each.name]["sampled"] = {**sampled, "published": beside}
    return found


def _throughput(
    params: Params, decoder: Decoder, questions: Sequence[Question], acceptance: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    settings: Throughput = getattr(params.evaluate, "throughput", None) or Throughput()
    if not settings.seconds:
        return None
    context = sum(len(question.ids) for question in questions) // len(questions) + params.evaluate.max_new_tokens // 2
    context = max(1, min(context, decoder.limit - decoder.block_size))
    with decoder.packed():
        return throughput.measure(
            decoder,
            acceptance["acceptance_by_offset"],
            context=context,
            concurrencies=settings.concurrencies,
            seconds=settings.seconds,
        )


def _compare(
    params: Params, parts: Path, comparison: Comparison, questions: Sequence[Question], stop_ids: set[int]
) -> list[Pair]:
    """Decode every question both ways; finished ones stay in `parts`, each with its two times from one process."""
    parts.mkdir(exist_ok=True)
    done = {q.id: pair for q in questions if (pair := _finished(parts / f"{q.id}.json")) is not None}
    left = [(index, q) for index, q in enumerate(questions) if q.id not in done]
    if left:
        comparison.decode(left[0][1].ids, max_new_tokens=WARM_UP_TOKENS, stop_ids=stop_ids)
    with Progress("evaluate", len(questions), "prompts", initial=len(done)) as progress:
        for index, question in left:
            pair = comparison.decode(
                question.ids,
                max_new_tokens=params.evaluate.max_new_tokens,
                stop_ids=stop_ids,
                prompt_id=question.id,
                source=question.source,
                speculative_first=index % 2 == 1,
            )
            atomic_write(parts / f"{question.id}.json", sealed(pair.to_json()))
            done[question.id] = pair
            so_far = figures(list(done.values()), comparison.speculative.block_size)
            shown = {"tau": so_far["tau_micro"], "speedup": so_far["speedup"]}
            progress.update(1, **{name: value for name, value in shown.items() if value is not None})
    return [done[q.id] for q in questions]


def _finished(path: Path) -> Pair | None:
    found = read_sealed(path)
    return None if found is None else Pair.from_json(found)


def _check_identity(ctx: EvaluateContext, questions: Sequence[Question], stop_ids: set[int]) -> dict[str, Any]:
    """Decode a few questions both ways in float32, where rounding no longer decides between tokens, and walk them."""
    if not questions:
        return {"greedy_identical": None, "walk_identical": None, "identity_prompts": 0, "identity_identical": 0}
    comparison = _load(ctx, "float32")
    identical, walk_identical = 0, True
    with Progress("evaluate: same ids in float32", len(questions), "prompts") as progress:
        for question in questions:
            tokens = ctx.params.evaluate.max_new_tokens
            pair = comparison.decode(question.ids, max_new_tokens=tokens, stop_ids=stop_ids)
            identical += pair.identical
            progress.update(1, identical=identical)
            note = ""
            if not pair.identical:
                note = f"float32 ids differ after {pair.same_prefix} tokens"
            elif place := differing_round(comparison.speculative, question, pair, stop_ids):
                walk_identical = False
                note = f"float32 decoding and the walk over its text differ from round {place} of {len(pair.rounds)} on"
            if note:
                print(f"evaluate: {note}, prompt {question.id}", file=sys.stderr, flush=True)
    return {
        "greedy_identical": identical == len(questions),
        "walk_identical": walk_identical if identical else None,
        "identity_prompts": len(questions),
        "identity_identical": identical,
    }


def _heldout_digest(decoded: Sequence[Question], walked: Sequence[Question], max_new_tokens: int) -> str:
    """Name the data, so that two checkpoints are compared on the same prompts only."""
    ids = [question.id for question in decoded]
    if walked:
        ids += ["walked", *(question.id for question in walked)]
    return hashlib.sha256("\n".join([str(max_new_tokens), *ids]).encode()).hexdigest()[:16]


def _write(ctx: EvaluateContext, pairs: Sequence[Pair], metrics: dict[str, Any], scratch: Path) -> Evaluation:
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture, curves, rows = (ctx.work / name for name in ("evaluation.png", "acceptance.json", "prompts.parquet"))
    title = f"{ctx.params.target.model.removeprefix('builtin:')}, block {metrics['block_size']}"
    shown = metrics.get(SECTION_OF_METRICS, metrics)
    curve.draw({**shown, **{name: metrics.get(name) for name in ("speedup", "throughput")}}, picture, title)
    kept = Acceptance(2).figures().keys()
    by_set = {f"set {name}": part for name, part in metrics.get("sets", {}).items()}
    parts = {"all": metrics, **metrics["by_source"], **by_set}
    if SECTION_OF_METRICS in metrics:
        parts[SECTION_OF_METRICS] = shown
    by_part = {name: {key: part[key] for key in kept} for name, part in parts.items()}
    curves.write_text(json.dumps({"block_size": metrics["block_size"], **by_part}, indent=2) + "\n")
    columns = table(pairs) or {"prompt_id": []}
    with rows.open("wb") as file:
        pq.write_table(pa.table(columns), file)
    logged = metrics if pairs else shown
    offsets = zip(logged["acceptance_by_offset"], logged["conditional_acceptance_by_offset"], strict=True)
    points = {}
    for k, (accepted, conditional) in enumerate(offsets, start=1):
        both = {"acceptance_at_offset": accepted, "conditional_acceptance_at_offset": conditional}
        known = {name: value for name, value in both.items() if value is not None}
        ctx.tracker.log_metrics(known, k)
        points[k] = known
    ctx.tracker.log_curves(points)
    ctx.tracker.log_table(columns, "prompts.json")
    ctx.tracker.log_artifact(curves)
    files = {path.name: path for path in (curves, rows, ctx.work / samples.FILE)}
    return Evaluation(metrics, picture, _headline(metrics), curve.points(metrics, shown), files, scratch=[scratch])


def _headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of headline.json, as far as they were measured."""
    walked, paying = metrics.get(SECTION_OF_METRICS), metrics.get("throughput")
    found = {name: metrics.get(name) for name in HEADLINE}
    found |= {"tau_micro": walked["tau_micro"], "tau_decoded": metrics["tau_micro"]} if walked else {}
    found |= {"predicted_speedup": paying["predicted_speedup"]} if paying else {}
    return {name: value for name, value in found.items() if value is not None}
