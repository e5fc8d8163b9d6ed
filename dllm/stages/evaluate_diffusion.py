"""Stage `evaluate` for a diffusion model: how likely it finds held-out answers, and how well and fast it writes them.

The same prompts are decoded in fewer and fewer passes and with each threshold, so that the table shows what writing
several tokens at a time costs in right answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.config.diffusion import DiffusionEvaluation
from dllm.config.params import Evaluate, Params
from dllm.errors import DataError
from dllm.progress import Progress
from dllm.prompts import references
from dllm.responses.shards import MANIFEST, Row, read_rows
from dllm.stages.workspace import Stage, open_stage

if TYPE_CHECKING:
    from dllm.models.diffusion.bidirectional import BidirectionalLM
    from dllm.training.batches import Example

POINT = 0.01
"""Share of words that writing in parallel may cost and still count as equally good."""


def is_diffusion(root: Path) -> bool:
    """Tell whether out/train/checkpoint is a diffusion model rather than a draft."""
    from dllm.models.diffusion.bidirectional import NOTE

    return (root / "out" / "train" / "checkpoint" / NOTE).is_file()


def run(params: Params, root: Path) -> dict[str, Any]:
    """Measure the trained model, publish out/evaluate/, and return its metrics.

    Raises:
        DataError: there is no held-out answer.
        ModelError: the checkpoint is missing or cannot be read.
    """
    from dllm.models import targets

    with open_stage(
        "evaluate",
        params,
        sections=[params.target, params.evaluate],
        inputs={
            "references": root / "out" / "prepare" / references.FILE,
            "answers": root / "out" / "regenerate" / MANIFEST,
            "checkpoint": root / "out" / "train" / "checkpoint",
        },
        identity={"target": targets.identity(params.target)},
        root=root,
    ) as stage:
        return _evaluate(params, root, stage)


def _evaluate(params: Params, root: Path, stage: Stage) -> dict[str, Any]:
    import torch

    from dllm.methods.diffusion import likelihood
    from dllm.models import targets
    from dllm.models.diffusion.bidirectional import BidirectionalLM
    from dllm.training.batches import make_examples

    settings = params.evaluate.diffusion or DiffusionEvaluation()
    folder = root / "out" / "regenerate"
    heldout = sorted(read_rows(folder, "heldout"), key=lambda row: (row.prompt_id, row.sample, row.turn))
    if not heldout:
        raise DataError("no held-out answer", where=str(folder), hint="raise prepare.heldout_fraction")
    likely = list(islice(_from_each_source_in_turn(heldout), settings.likelihood_answers))
    checkpoint = root / "out" / "train" / "checkpoint"
    asked: dict[str, Any] = {"dtype": params.target.dtype, "device": targets.best_device()}
    trusted = params.target.trust_remote_code
    model = BidirectionalLM.from_directory(checkpoint, **asked, trust_remote_code=trusted, paired=True).eval()
    examples = make_examples(likely, model.longest).kept
    with Progress("evaluate: likelihood", len(examples), "answers") as progress:
        bound = likelihood.bound(
            model,
            examples,
            samples=settings.likelihood_samples,
            batch_size=settings.batch_size,
            seed=0,
            advance=progress.update,
        ).figures()
    if model.note.mode == "hybrid":
        bound["ar_nll"] = likelihood.causal_nll(model, examples, batch_size=settings.batch_size)
    if model.lays_out_pairs:  # such code is built one way for likelihood and another for generation
        model = BidirectionalLM.from_directory(checkpoint, **asked, trust_remote_code=trusted).eval()
    rows, too_long = _prompts(heldout, params.evaluate, model.longest)
    known = references.read_references(root / "out" / "prepare")
    decodings, written = _decode(params, settings, model, rows, _words(read_rows(folder, "train")), known)
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
        "mode": model.note.mode,
        "block_size": model.note.block_size,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": params.target.dtype,
        "device": str(model.head_VD.device),
        "threads": torch.get_num_threads(),
    }
    _publish(stage, written, metrics)
    return metrics


def _by_source(rows: Sequence[Row]) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.source, []).append(row)
    return list(found.values())


def _from_each_source_in_turn(rows: Sequence[Row]) -> Iterator[Row]:
    for turn in zip_longest(*_by_source(rows)):
        yield from (row for row in turn if row is not None)


def _prompts(rows: Sequence[Row], asked: Evaluate, longest: int) -> tuple[list[Row], int]:
    """Take the first prompts of each source, each once, and count those that leave no room to answer."""
    found, too_long = [], 0
    for own in _by_source(rows):
        once: dict[tuple[str, int], Row] = {}
        for row in own:
            once.setdefault((row.prompt_id, row.turn), row)
        fitting = [row for row in once.values() if len(row.prompt_ids) + asked.max_new_tokens <= longest]
        too_long += len(once) - len(fitting)
        found += fitting[: asked.num_prompts]
    if not found:
        raise DataError(
            f"none of {too_long} held-out prompts leaves room for {asked.max_new_tokens} new tokens among the model's "
            f"{longest}",
            where="evaluate.max_new_tokens",
        )
    return found, too_long


def _words(rows: Sequence[Row]) -> set[str]:
    return {word for row in rows for word in str(row.messages[-1]["content"]).split()}


def _decode(
    params: Params,
    settings: DiffusionEvaluation,
    model: BidirectionalLM,
    rows: Sequence[Row],
    seen: set[str],
    known: Mapping[str, str],
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    from dllm.decoding.samplers import default_sampler
    from dllm.decoding.settings import Settings
    from dllm.methods.diffusion.responses import figures, name_of, write_answers

    asked: dict[str, Any] = {
        "max_new_tokens": params.evaluate.max_new_tokens,
        "block_size": params.evaluate.block_size or None,
    }
    own = default_sampler(model)
    ways = [(own, Settings(**asked, steps=steps)) for steps in settings.steps]
    cache = settings.cache if own == "llada" else "none"  # the others keep what is final in any case
    ways += [(own, Settings(**asked, threshold=threshold, cache=cache)) for threshold in settings.thresholds]
    if model.note.context == "causal":
        ways += [(sampler, Settings(**asked)) for sampler in ("ar", "self-spec")]
    columns = ("prompt_id", "way", "wanted", "reference", "written", "passes")
    table: dict[str, list[Any]] = {name: [] for name in columns}
    found = []
    with Progress("evaluate: decoding", len(ways) * len(rows), "answers") as progress:
        for sampler, way in ways:
            answers = write_answers(model, rows, sampler, way, settings.batch_size, progress.update, known)
            about = {"way": name_of(sampler, way), "sampler": sampler, "threshold": way.threshold, "steps": way.steps}
            found.append({**about, **figures(answers, seen)})
            for answer in answers:
                values = (answer.id, about["way"], answer.wanted, answer.reference, answer.text, answer.passes)
                for name, value in zip(columns, values, strict=True):
                    table[name].append(value)
    return found, table


def most_parallel(decodings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the way with the most tokens a pass that gets within a point of the words that the first one gets."""
    wanted = (decodings[0]["words_exact"] or 0.0) - POINT
    fine = [way for way in decodings if (way["words_exact"] or 0.0) >= wanted]
    return max(fine, key=lambda way: float(way["tokens_per_pass"]))


def _digest(
    params: Params,
    settings: DiffusionEvaluation,
    examples: Sequence[Example],
    rows: Sequence[Row],
    known: Mapping[str, str],
) -> str:
    """Name what the score was measured on and how, so that two checkpoints are compared on the same terms only."""
    terms: list[Any] = [settings.score, params.target.dtype]
    if settings.score == "nelbo":
        terms += [settings.likelihood_samples, [[list(each.input_ids), each.prompt_length] for each in examples]]
    else:
        terms += [settings.steps[0], params.evaluate.max_new_tokens, params.evaluate.block_size]
        terms += [[row.prompt_ids, row.messages[-1].get("content"), known.get(row.prompt_id)] for row in rows]
    return hashlib.sha256(json.dumps(terms).encode()).hexdigest()[:16]


def _publish(stage: Stage, table: dict[str, list[Any]], metrics: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dllm.methods.diffusion import curve

    rows, picture = stage.work / "answers.parquet", stage.work / "noise.png"
    with rows.open("wb") as file:
        pq.write_table(pa.table(table), file)
    curve.draw(metrics, picture)
    for level in metrics["by_noise_level"]:
        if level["accuracy"] is not None:
            named = {"accuracy_at_noise": level["accuracy"], "cross_entropy_at_noise": level["cross_entropy"]}
            stage.tracker.log_metrics(named, round(100 * level["masked_up_to"]))
    stage.tracker.log_artifact(picture)
    stage.publish({path.name: path for path in (rows, picture)}, metrics)
