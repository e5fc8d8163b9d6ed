"""Evaluation of a diffusion model: likelihood bound of held-out responses, and quality and speed of decoding.

The same prompts are decoded in fewer and fewer forward passes and with each threshold, which shows what it costs in
correct responses to generate several tokens per pass.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dllm.config.params import Evaluate, Params
from dllm.decoding.settings import Settings
from dllm.errors import DataError
from dllm.methods.diffusion import curve, likelihood
from dllm.methods.diffusion.responses import figures, generate_responses
from dllm.methods.diffusion.settings import DiffusionEvaluation
from dllm.methods.method import EvaluateContext, Evaluation
from dllm.models import targets
from dllm.models.diffusion.families import load_checkpoint
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.models.precision import compute_dtype, name_of, note
from dllm.progress import Progress
from dllm.prompts import references
from dllm.registry import SAMPLERS
from dllm.responses.shards import SCHEMA, Row, ShardEntry, iter_rows, shard_name, write_manifest, write_shard
from dllm.training.batches import Example, make_examples

POINT = 0.01
"""Fraction of words that parallel decoding may lose and still count as equally good."""
HEADLINE = (
    "score", "nelbo", "masked_acc", "answers_right", "words_exact", "words_unseen_exact", "parallel_words_exact",
    "parallel_tokens_per_pass", "parallel_tokens_per_s", "ar_nll",
)  # fmt: skip
"""Figures of headline.json, as far as they were measured."""
KNOWN_WORDS = "known_words.json"
SHARD_ROWS = 1000


def write_heldout(responses: Path, folder: Path) -> dict[str, Path]:
    """Copy what evaluation reads of the regenerated responses: held-out rows, and which of their words are known.

    Rows are streamed; only words of held-out responses are kept in memory.

    Args:
        responses: out/regenerate/.
        folder: where the files go; a reader sees a folder of responses.

    Returns: the files by name.
    """
    folder.mkdir(exist_ok=True)
    entries: list[ShardEntry] = []
    words: set[str] = set()
    rows = iter_rows(responses, "heldout")
    while part := list(islice(rows, SHARD_ROWS)):
        entries.append(write_shard(part, folder / shard_name(len(entries))))
        words.update(word for row in part for word in _words(row))
    known: set[str] = set()
    for row in iter_rows(responses, "train"):
        known.update(word for word in _words(row) if word in words)
    (folder / KNOWN_WORDS).write_text(json.dumps(sorted(known)) + "\n")
    manifest = write_manifest(folder, {"schema": SCHEMA, "shards": entries})
    paths = [manifest, folder / KNOWN_WORDS, *(folder / entry["file"] for entry in entries)]
    return {path.name: path for path in paths}


def evaluate(ctx: EvaluateContext, data: Path, settings: DiffusionEvaluation, predicts_next: bool) -> Evaluation:
    """Measure the trained model.

    Args:
        ctx: the run.
        data: the folder that `write_heldout` wrote.
        settings: `evaluate.diffusion`.
        predicts_next: measure the likelihood under next-token prediction, too.

    Raises:
        DataError: there is no held-out response.
        ModelError: the checkpoint is missing or cannot be read.
    """
    params = ctx.params
    heldout = sorted(iter_rows(data, "heldout"), key=lambda row: (row.prompt_id, row.sample, row.turn))
    if not heldout:
        raise DataError("no held-out response", where=str(data), hint="raise prepare.heldout_fraction")
    measured = list(islice(_from_each_source_in_turn(heldout), settings.likelihood_answers))
    device = targets.best_device()
    where: dict[str, Any] = {"dtype": compute_dtype(params.target.dtype, device), "device": device}
    if line := note(params.target.dtype, device):
        print(f"evaluate: {line}", file=sys.stderr, flush=True)
    trusted = params.target.trust_remote_code
    model = load_checkpoint(ctx.checkpoint, **where, trust_remote_code=trusted)
    scorer = model.for_likelihood()
    examples = make_examples(measured, model.max_length).kept
    with Progress("evaluate: likelihood", len(examples), "responses") as progress:
        bound = likelihood.bound(
            scorer,
            examples,
            samples=settings.likelihood_samples,
            batch_size=settings.batch_size,
            seed=0,
            advance=progress.update,
        ).figures()
    if predicts_next:
        bound["ar_nll"] = likelihood.causal_nll(scorer, examples, batch_size=settings.batch_size)
    rows, too_long = _prompts(heldout, params.evaluate, model.max_length)
    known = references.read_references(ctx.root / "out" / "prepare")
    seen = set(json.loads((data / KNOWN_WORDS).read_text()))
    decodings, responses = _decode(params, settings, model, rows, seen, known)
    plain, parallel = decodings[0], most_parallel(decodings)
    answers = plain["answers_exact"] if plain["answers_right"] is None else plain["answers_right"]
    scores = {"nelbo": -bound["nelbo"], "words": plain["words_exact"] or 0.0, "answers": answers}
    metrics = {
        **bound,
        **{name: plain[name] for name in ("answers_right", "answers_exact", "words_exact", "words_unseen_exact")},
        **{f"parallel_{name}": parallel[name] for name in ("words_exact", "tokens_per_pass", "tokens_per_s")},
        "decodings": decodings,
        "prompts_too_long": too_long,
        "score": scores[settings.score],
        "score_is": settings.score,
        "heldout_digest": _digest(params, settings, examples, rows, known),
        "mode": model.config.mode,
        "block_size": model.config.block_size,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": name_of(where["dtype"]),
        "device": str(model.head_VD.device),
        "threads": torch.get_num_threads(),
    }
    return _write(ctx, responses, metrics)


def _words(row: Row) -> list[str]:
    return str(row.messages[-1]["content"]).split()


def _by_source(rows: Sequence[Row]) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.source, []).append(row)
    return list(found.values())


def _from_each_source_in_turn(rows: Sequence[Row]) -> Iterator[Row]:
    for turn in zip_longest(*_by_source(rows)):
        yield from (row for row in turn if row is not None)


def _prompts(rows: Sequence[Row], settings: Evaluate, max_length: int) -> tuple[list[Row], int]:
    """Take the first prompts of each source, each once, and count those that leave no room for a response."""
    found, too_long = [], 0
    for same_source in _by_source(rows):
        once: dict[tuple[str, int], Row] = {}
        for row in same_source:
            once.setdefault((row.prompt_id, row.turn), row)
        fitting = [row for row in once.values() if len(row.prompt_ids) + settings.max_new_tokens <= max_length]
        too_long += len(once) - len(fitting)
        found += fitting[: settings.num_prompts]
    if not found:
        raise DataError(
            f"none of {too_long} held-out prompts leaves room for {settings.max_new_tokens} new tokens within the "
            f"{max_length} of the model",
            where="evaluate.max_new_tokens",
        )
    return found, too_long


def _decode(
    params: Params,
    settings: DiffusionEvaluation,
    model: DiffusionLM,
    rows: Sequence[Row],
    seen: set[str],
    known: Mapping[str, str],
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    common: dict[str, Any] = {
        "max_new_tokens": params.evaluate.max_new_tokens,
        "block_size": params.evaluate.block_size or None,
    }
    default = model.default_sampler
    ways = [(default, Settings(**common, steps=steps)) for steps in settings.steps]
    has_own_cache = bool(SAMPLERS[default].unused(model, {"cache": settings.cache}))
    cache = "none" if has_own_cache else settings.cache
    ways += [(default, Settings(**common, threshold=threshold, cache=cache)) for threshold in settings.thresholds]
    if model.config.context == "causal":
        ways += [(name, Settings(**common)) for name, sampler in SAMPLERS.items() if sampler.evaluated]
    columns = ("prompt_id", "way", "wanted", "reference", "written", "passes")
    table: dict[str, list[Any]] = {name: [] for name in columns}
    found = []
    with Progress("evaluate: decoding", len(ways) * len(rows), "responses") as progress:
        for sampler, way in ways:
            responses = generate_responses(model, rows, sampler, way, settings.batch_size, progress.update, known)
            about = {
                "way": SAMPLERS[sampler].describe(way),
                "sampler": sampler,
                "threshold": way.threshold,
                "steps": way.steps,
            }
            found.append({**about, **figures(responses, seen)})
            for each in responses:
                values = (each.id, about["way"], each.expected, each.reference, each.text, each.passes)
                for column, value in zip(columns, values, strict=True):
                    table[column].append(value)
    return found, table


def most_parallel(decodings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the way with the most tokens per pass whose fraction of correct words is within POINT of the first way."""
    least = (decodings[0]["words_exact"] or 0.0) - POINT
    fine = [way for way in decodings if (way["words_exact"] or 0.0) >= least]
    return max(fine, key=lambda way: float(way["tokens_per_pass"]))


def _digest(
    params: Params,
    settings: DiffusionEvaluation,
    examples: Sequence[Example],
    rows: Sequence[Row],
    known: Mapping[str, str],
) -> str:
    """Name the data and settings of the score, so that two checkpoints are compared under equal conditions only."""
    terms: list[Any] = [settings.score, params.target.dtype]
    if settings.score == "nelbo":
        terms += [settings.likelihood_samples, [[list(each.input_ids), each.prompt_length] for each in examples]]
    else:
        terms += [settings.steps[0], params.evaluate.max_new_tokens, params.evaluate.block_size]
        terms += [[row.prompt_ids, row.messages[-1].get("content"), known.get(row.prompt_id)] for row in rows]
    return hashlib.sha256(json.dumps(terms).encode()).hexdigest()[:16]


def _write(ctx: EvaluateContext, table: dict[str, list[Any]], metrics: dict[str, Any]) -> Evaluation:
    rows, picture = ctx.work / "answers.parquet", ctx.work / "evaluation.png"
    with rows.open("wb") as file:
        pq.write_table(pa.table(table), file)
    curve.draw(metrics, picture)
    points = {}
    for level in metrics["by_noise_level"]:
        if level["accuracy"] is not None:
            at_noise = {"accuracy_at_noise": level["accuracy"], "cross_entropy_at_noise": level["cross_entropy"]}
            percent = round(100 * level["masked_up_to"])
            ctx.tracker.log_metrics(at_noise, percent)
            points[percent] = at_noise
    ctx.tracker.log_curves(points)
    headline = {name: metrics[name] for name in HEADLINE if metrics.get(name) is not None}
    return Evaluation(metrics, picture, headline, curve.points(metrics), {rows.name: rows})
