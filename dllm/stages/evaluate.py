"""Stage `evaluate`: how many tokens a round the draft brings on held-out prompts, and how much faster that is.

Each prompt is decoded autoregressively and speculatively, one right after the other in one process and in alternating
order, so that a drifting machine slows both. A few prompts are decoded again in float32, where the ids must be equal.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.config.params import Params
from dllm.errors import DataError
from dllm.files import atomic_write
from dllm.progress import Progress
from dllm.stages.workspace import Stage, open_stage

if TYPE_CHECKING:
    from dllm.decoding.comparison import Comparison, Pair

WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Question:
    """A held-out prompt as ids."""

    id: str
    source: str
    ids: tuple[int, ...]


def run(params: Params, root: Path) -> dict[str, Any]:
    """Measure the trained draft or diffusion model, publish out/evaluate/, and return its metrics.

    Raises:
        DataError: there is no held-out prompt that fits the target.
        ModelError: the target or the draft is missing, or they do not fit.
    """
    from dllm.models import targets
    from dllm.stages import evaluate_diffusion

    if evaluate_diffusion.is_diffusion(root):
        return evaluate_diffusion.run(params, root)
    identity = targets.identity(params.target)
    with open_stage(
        "evaluate",
        params,
        sections=[params.target, params.evaluate],
        inputs={
            "prompts": root / "out" / "prepare" / "prompts.parquet",
            "checkpoint": root / "out" / "train" / "checkpoint",
        },
        identity={"target": identity},
        root=root,
    ) as stage:
        return _evaluate(params, root, stage)


def _evaluate(params: Params, root: Path, stage: Stage) -> dict[str, Any]:
    import torch

    from dllm.decoding.comparison import figures
    from dllm.models import targets
    from dllm.models.packing import packed_linears

    checkpoint = root / "out" / "train" / "checkpoint"
    comparison = _load(params, checkpoint, params.target.dtype)
    speculative = comparison.speculative
    tokenizer = targets.load_tokenizer(params.target)
    stop_ids = targets.stop_ids(speculative.model, tokenizer)
    questions, passed_over = _questions(params, root, tokenizer, speculative.limit)
    draft, device = speculative.draft, speculative.model.device
    assert draft is not None
    with packed_linears(speculative.model, draft):  # both ways of decoding gain from it
        pairs = _compare(params, stage, comparison, questions, stop_ids)
    metrics = {
        **figures(pairs, speculative.block_size),
        "by_source": {
            source: figures([p for p in pairs if p.source == source], speculative.block_size)
            for source in sorted({p.source for p in pairs})
        },
        "block_size": speculative.block_size,
        "draft_params": sum(parameter.numel() for parameter in draft.parameters()),
        "draft_layers": draft.config.num_hidden_layers,
        **passed_over,
        "heldout_digest": _heldout_digest([q.id for q in questions], params.evaluate.max_new_tokens),
        "dtype": params.target.dtype,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    del comparison, speculative, draft  # the float32 target needs the room
    metrics |= _check_identity(params, stage, checkpoint, questions[: params.evaluate.identity_prompts], stop_ids)
    _publish(params, stage, pairs, metrics)
    shutil.rmtree(stage.work / "prompts")  # a forced rerun measures again
    return metrics


def _load(params: Params, checkpoint: Path, dtype: str) -> Comparison:
    from dllm.decoding.comparison import Comparison
    from dllm.decoding.speculative import Decoder
    from dllm.models import targets
    from dllm.models.drafts.checkpoint import load_draft

    model = targets.load_target(params.target, dtype)
    draft = load_draft(checkpoint, model.config).to(model.device, model.dtype)
    return Comparison(Decoder(model), Decoder(model, draft, params.evaluate.block_size))


def _questions(params: Params, root: Path, tokenizer: Any, limit: int) -> tuple[list[Question], dict[str, int]]:
    """Take the first held-out prompts of each source by id; count those that leave no room to answer, or that the
    chat template refuses."""
    from dllm.prompts.table import HELDOUT, read_prompts
    from dllm.prompts.template import prompt_ids

    taken: dict[str, list[Question]] = {}
    passed_over = {"prompts_too_long": 0, "prompts_refused": 0}
    refusal: DataError | None = None
    for prompt in read_prompts(root / "out" / "prepare", HELDOUT):
        own = taken.setdefault(prompt.source, [])
        if len(own) == params.evaluate.num_prompts:
            continue
        try:
            ids = prompt_ids(tokenizer, prompt.messages, params.target.enable_thinking, tools=prompt.tools)
        except DataError as error:  # regenerate has set it aside, too
            refusal, passed_over["prompts_refused"] = error, passed_over["prompts_refused"] + 1
            continue
        if len(ids) >= limit:
            passed_over["prompts_too_long"] += 1
        else:
            own.append(Question(prompt.id, prompt.source, tuple(ids)))
    questions = sorted((q for own in taken.values() for q in own), key=lambda q: q.id)
    if refusal and not questions:
        raise refusal
    if not questions:
        long = passed_over["prompts_too_long"]
        raise DataError(
            "no held-out prompt to evaluate on",
            where=str(root / "out" / "prepare"),
            hint=f"{long} were longer than the target's {limit} positions; raise prepare.heldout_fraction",
        )
    return questions, passed_over


def _compare(
    params: Params, stage: Stage, comparison: Comparison, questions: Sequence[Question], stop_ids: set[int]
) -> list[Pair]:
    """Decode every question both ways; finished ones are kept in work, each with its two times from one process."""
    from dllm.decoding.comparison import figures

    parts = stage.work / "prompts"
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
            atomic_write(parts / f"{question.id}.json", json.dumps(pair.to_json()).encode())
            done[question.id] = pair
            so_far = figures(list(done.values()), comparison.speculative.block_size)
            shown = {"tau": so_far["tau_micro"], "speedup": so_far["speedup"]}
            progress.update(1, **{name: value for name, value in shown.items() if value is not None})
    return [done[q.id] for q in questions]


def _finished(path: Path) -> Pair | None:
    from dllm.decoding.comparison import Pair

    try:
        return Pair.from_json(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # not there, or torn by a power cut
        return None


def _check_identity(
    params: Params, stage: Stage, checkpoint: Path, questions: Sequence[Question], stop_ids: set[int]
) -> dict[str, Any]:
    """Decode a few questions both ways in float32, where rounding no longer decides between tokens."""
    if not questions:
        return {"greedy_identical": None, "identity_prompts": 0, "identity_identical": 0}
    comparison = _load(params, checkpoint, "float32")
    identical = 0
    with Progress("evaluate: same ids in float32", len(questions), "prompts") as progress:
        for question in questions:
            pair = comparison.decode(question.ids, max_new_tokens=params.evaluate.max_new_tokens, stop_ids=stop_ids)
            identical += pair.identical
            progress.update(1, identical=identical)
            if not pair.identical:
                note = f"evaluate: float32 ids differ after {pair.same_prefix} tokens on prompt {question.id}"
                print(note, file=sys.stderr, flush=True)
    return {
        "greedy_identical": identical == len(questions),
        "identity_prompts": len(questions),
        "identity_identical": identical,
    }


def _heldout_digest(ids: Sequence[str], max_new_tokens: int) -> str:
    """Name what was measured on, so that two checkpoints are compared on the same prompts only."""
    return hashlib.sha256("\n".join([str(max_new_tokens), *ids]).encode()).hexdigest()[:16]


def _publish(params: Params, stage: Stage, pairs: Sequence[Pair], metrics: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dllm.decoding.acceptance import Acceptance
    from dllm.decoding.comparison import table
    from dllm.methods.dflash import curve

    picture, record, rows = (stage.work / name for name in ("acceptance.png", "acceptance.json", "prompts.parquet"))
    curve.draw(metrics, picture, f"{params.target.model.removeprefix('builtin:')}, block {metrics['block_size']}")
    kept = Acceptance(2).figures().keys()
    parts = {"all": metrics, **metrics["by_source"]}
    curves = {name: {key: part[key] for key in kept} for name, part in parts.items()}
    record.write_text(json.dumps({"block_size": metrics["block_size"], **curves}, indent=2) + "\n")
    columns = table(pairs)
    with rows.open("wb") as file:
        pq.write_table(pa.table(columns), file)
    offsets = zip(metrics["acceptance_by_offset"], metrics["conditional_acceptance_by_offset"], strict=True)
    for k, (reached, given) in enumerate(offsets, start=1):
        both = {"acceptance_at_offset": reached, "conditional_acceptance_at_offset": given}
        stage.tracker.log_metrics({name: value for name, value in both.items() if value is not None}, k)
    stage.tracker.log_table(columns, "prompts.json")
    for path in (picture, record):
        stage.tracker.log_artifact(path)
    stage.publish({path.name: path for path in (picture, record, rows)}, metrics)
