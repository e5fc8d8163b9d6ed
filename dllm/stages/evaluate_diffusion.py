"""Stage `evaluate` for a diffusion model: how likely it finds held-out answers, and how well and fast it writes them.

The same prompts are decoded in fewer and fewer passes and with each threshold, so that the table shows what writing
several tokens at a time costs in right answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.config import DiffusionEvaluation, Params
from dllm.data.shards import MANIFEST, Row, read_rows
from dllm.errors import DataError
from dllm.progress import Progress
from dllm.stages.contract import Stage, open_stage

if TYPE_CHECKING:
    from dllm.models.bidirectional import BidirectionalLM

POINT = 0.01
"""Share of words that writing in parallel may cost and still count as equally good."""


def is_diffusion(root: Path) -> bool:
    """Tell whether out/train/checkpoint is a diffusion model rather than a draft."""
    from dllm.models.bidirectional import NOTE

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
            "answers": root / "out" / "regenerate" / MANIFEST,
            "checkpoint": root / "out" / "train" / "checkpoint",
        },
        identity={"target": targets.identity(params.target)},
        root=root,
    ) as stage:
        return _evaluate(params, root, stage)


def _evaluate(params: Params, root: Path, stage: Stage) -> dict[str, Any]:
    import torch

    from dllm.data.collate import make_examples
    from dllm.diffusion import likelihood
    from dllm.models import targets
    from dllm.models.bidirectional import BidirectionalLM

    settings = params.evaluate.diffusion or DiffusionEvaluation()
    folder = root / "out" / "regenerate"
    heldout = sorted(read_rows(folder, "heldout"), key=lambda row: (row.prompt_id, row.sample, row.turn))
    if not heldout:
        raise DataError("no held-out answer", where=str(folder), hint="raise prepare.heldout_fraction")
    checkpoint = root / "out" / "train" / "checkpoint"
    asked: dict[str, Any] = {"dtype": params.target.dtype, "device": targets.best_device()}
    trusted = params.target.trust_remote_code
    model = BidirectionalLM.from_directory(checkpoint, **asked, trust_remote_code=trusted, paired=True).eval()
    examples = make_examples(heldout[: settings.likelihood_answers], model.longest).kept
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
    rows = _first_of_each_source(heldout, params.evaluate.num_prompts)
    decodings, written = _decode(params, settings, model, rows, _words(read_rows(folder, "train")))
    plain, parallel = decodings[0], most_parallel(decodings)
    score = -bound["nelbo"] if settings.score == "nelbo" else plain["words_exact"]
    metrics = {
        **bound,
        **{name: plain[name] for name in ("answers_exact", "words_exact", "words_unseen_exact")},
        **{f"parallel_{name}": parallel[name] for name in ("words_exact", "tokens_per_pass", "tokens_per_s")},
        "decodings": decodings,
        "score": score,
        "score_is": settings.score,
        "heldout_digest": _digest(settings, [example.id for example in examples], [row.prompt_id for row in rows]),
        "mode": model.note.mode,
        "block_size": model.note.block_size,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": params.target.dtype,
        "device": str(model.head_VD.device),
        "threads": torch.get_num_threads(),
    }
    _publish(stage, written, metrics)
    return metrics


def _first_of_each_source(rows: Sequence[Row], number: int) -> list[Row]:
    taken: dict[str, list[Row]] = {}
    for row in rows:
        own = taken.setdefault(row.source, [])
        if len(own) < number:
            own.append(row)
    return [row for own in taken.values() for row in own]


def _words(rows: Sequence[Row]) -> set[str]:
    return {word for row in rows for word in str(row.messages[-1]["content"]).split()}


def _decode(
    params: Params, settings: DiffusionEvaluation, model: BidirectionalLM, rows: Sequence[Row], seen: set[str]
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    from dllm.diffusion.answering import figures, name_of, write_answers
    from dllm.diffusion.sampler_settings import Settings
    from dllm.diffusion.writing import default_sampler

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
    columns = ("prompt_id", "way", "wanted", "written", "passes")
    table: dict[str, list[Any]] = {name: [] for name in columns}
    found = []
    with Progress("evaluate: decoding", len(ways) * len(rows), "answers") as progress:
        for sampler, way in ways:
            answers = write_answers(model, rows, sampler, way, settings.batch_size, progress.update)
            about = {"way": name_of(sampler, way), "sampler": sampler, "threshold": way.threshold, "steps": way.steps}
            found.append({**about, **figures(answers, seen)})
            for answer in answers:
                values = (answer.id, about["way"], answer.wanted, answer.text, answer.passes)
                for name, value in zip(columns, values, strict=True):
                    table[name].append(value)
    return found, table


def most_parallel(decodings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the way with the most tokens a pass that gets within a point of the words that the first one gets."""
    wanted = (decodings[0]["words_exact"] or 0.0) - POINT
    fine = [way for way in decodings if (way["words_exact"] or 0.0) >= wanted]
    return max(fine, key=lambda way: float(way["tokens_per_pass"]))


def _digest(settings: DiffusionEvaluation, likely: Sequence[str], decoded: Sequence[str]) -> str:
    """Name what was measured on and how, so that two checkpoints are compared on the same terms only."""
    about = json.dumps([settings.model_dump(mode="json"), list(likely), list(decoded)])
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def _publish(stage: Stage, table: dict[str, list[Any]], metrics: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, picture = stage.work / "answers.parquet", stage.work / "noise.png"
    with rows.open("wb") as file:
        pq.write_table(pa.table(table), file)
    _draw(metrics, picture)
    for level in metrics["by_noise_level"]:
        if level["accuracy"] is not None:
            named = {"accuracy_at_noise": level["accuracy"], "cross_entropy_at_noise": level["cross_entropy"]}
            stage.tracker.log_metrics(named, round(100 * level["masked_up_to"]))
    stage.tracker.log_artifact(picture)
    stage.publish({path.name: path for path in (rows, picture)}, metrics)


def _draw(metrics: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = [level for level in metrics["by_noise_level"] if level["accuracy"] is not None]
    left.plot([level["masked_up_to"] for level in levels], [level["accuracy"] for level in levels], "o-")
    left.set(xlabel="share of tokens masked, up to", ylabel="accuracy on masked tokens", ylim=(0, 1.05))
    lines: dict[str, dict[tuple[float, float], list[str]]] = {}
    for way in metrics["decodings"]:
        kind = "threshold" if way["threshold"] is not None else way["sampler"]
        line = lines.setdefault(kind if kind in ("threshold", "ar", "self-spec") else "so many passes", {})
        number = way["threshold"] or way["steps"]
        name = way["way"] if number is None else f"{number:g}"
        line.setdefault((way["tokens_per_pass"], way["words_exact"] or 0.0), []).append(name)
    for (label, places), mark in zip(lines.items(), ("s--", "o-", "^", "v"), strict=False):
        right.plot(*zip(*places, strict=True), mark, label=label)
        # Labels of one line below its points, of the next beside them: they often meet.
        at = {"xytext": (0, -13), "ha": "center"} if mark == "s--" else {"xytext": (7, -3), "ha": "left"}
        for place, names in places.items():
            right.annotate(", ".join(names), place, textcoords="offset points", fontsize=8, **at)
    right.legend()
    tokens = [way["tokens_per_pass"] for way in metrics["decodings"]]
    if max(tokens) > 8 * min(tokens) > 0:
        right.set_xscale("log", base=2)
        right.xaxis.set_major_formatter("{x:g}")
    right.margins(x=0.2)
    right.set(xlabel="tokens a pass", ylabel="words right", ylim=(0, 1.05))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
