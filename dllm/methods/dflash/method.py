"""The method `dflash`: a draft model for speculative decoding, trained on hidden states of the frozen target.

Checking a params file imports this module: what imports torch (1 second) is imported when a run needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dllm.config.section import Section
from dllm.methods.dflash.abilities import ABILITIES, check_evaluation
from dllm.methods.dflash.settings import Dflash, Throughput, Walk
from dllm.methods.figures import DASH, Records, Row, Table, by_number, count, number
from dllm.methods.method import EvaluateContext, Evaluation, Method, PlanContext, Publication, Score, TrainContext
from dllm.outside import one_line
from dllm.registry import ENGINES

if TYPE_CHECKING:
    from dllm.config.params import Params
    from dllm.methods.dflash.features import Part
    from dllm.methods.dflash.strategy import DflashStrategy
    from dllm.training.batches import Example
    from dllm.training.loop import Outcome
    from dllm.training.plan import Plan

FEATURES = Path("work", "features")
"""Caches of the target's hidden states, shared by all configurations: gigabytes, faster to read than to compute."""


MOST_COLUMNS = 5
"""Numbers of draft tokens that all have a column in the table of throughput."""


class DflashMethod:
    """Train a DFlash draft, and measure its acceptance length in speculative decoding."""

    settings = Dflash
    evaluation: Mapping[str, type[Section]] = {"walk": Walk, "throughput": Throughput}
    reads: Mapping[str, str] = {"prompts": "out/prepare/prompts.parquet"}

    def check(self, params: Params) -> None:
        block = cast(Dflash, params.train.method_settings).block_size
        if block and params.evaluate.block_size > block:
            raise ValueError(
                f"evaluate.block_size is {params.evaluate.block_size}, larger than train.dflash.block_size {block}; "
                "a draft cannot be decoded with larger blocks than it was trained on"
            )

    def check_models(self, params: Params) -> str:
        from dllm.methods.dflash.build import check_models

        decoded = check_models(cast(Dflash, params.train.method_settings), params.target)
        check_evaluation(decoded, params.evaluate, where=f"target.model: {params.target.model}")
        return f"target {one_line(params.target.model)}: {ABILITIES[decoded]}"

    def identity(self, params: Params) -> Mapping[str, Any]:
        from dllm.models.drafts.checkpoint import draft_identity

        draft = cast(Dflash, params.train.method_settings).draft
        return {} if draft.init == "random" else {"draft": draft_identity(draft.init, draft.revision)}

    def plan(self, ctx: PlanContext[Dflash]) -> Plan:
        from dllm.methods.dflash.plan import plan

        return plan(ctx)

    def build(self, ctx: TrainContext[Dflash]) -> DflashStrategy:
        import torch

        from dllm.methods.dflash.build import initial_draft
        from dllm.methods.dflash.dry_run import dry_run
        from dllm.methods.dflash.features import CachedFeatures, OnlineFeatures
        from dllm.methods.dflash.greedy import greedy_rows
        from dllm.methods.dflash.strategy import DflashStrategy
        from dllm.models import targets
        from dllm.models.positions import max_positions
        from dllm.prompts.template import stop_ids

        settings, params = ctx.settings, ctx.params
        target = targets.load_target(params.target, device=ctx.ranks.device)
        tokenizer = targets.load_tokenizer(params.target)
        draft = initial_draft(settings, target, tokenizer, params.train.seed).to(ctx.ranks.device)
        if ctx.ranks.is_main:
            dry_run(draft, getattr(torch, params.train.compute_dtype), ctx.work / "dry-run")
        embedding_VD: Any = target.get_input_embeddings().weight
        head_VD: Any = target.get_output_embeddings().weight
        layer_ids = draft.config.target_layer_ids
        stops = stop_ids(tokenizer, target.generation_config, target.config.get_text_config())
        positions = max_positions(params.target)
        splits: dict[Part, Sequence[Example]] = {"train": ctx.splits["train"], "heldout": ctx.splits["heldout"]}
        # A dataset's own responses are no decoding of the target, nor are sampled ones.
        greedy, is_greedy = None, params.regenerate.temperature == 0 and ENGINES[params.regenerate.engine].generates
        if settings.walk_samples and not is_greedy:
            greedy = greedy_rows(
                ctx.root,
                params.target,
                target,
                ctx.splits["heldout"][: settings.walk_samples],
                block_size=draft.config.block_size,
                stop_ids=stops,
                max_positions=positions,
                ranks=ctx.ranks,
            )
            splits["greedy"] = greedy.examples
        source: CachedFeatures | OnlineFeatures
        if settings.features == "cached":
            source = CachedFeatures(
                ctx.root / FEATURES,
                splits,
                identity=dict(ctx.target),
                layer_ids=layer_ids,
                dtype=params.target.dtype,
                with_last=settings.distill > 0,
            )
            source.fill(target, ctx.ranks)
        else:
            source = OnlineFeatures(target, layer_ids, splits, with_last=settings.distill > 0)
        del target  # with cached features only its embedding and head stay in memory
        return DflashStrategy(draft, embedding_VD, head_VD, ctx.splits, source, params.train, stops, positions, greedy)

    def sizes(self, strategy: DflashStrategy) -> dict[str, int | None]:
        size = sum(parameter.numel() for parameter in strategy.model.parameters())
        return {"draft_params": size, "block_size": strategy.model.config.block_size}

    def publish(self, ctx: TrainContext[Dflash], strategy: DflashStrategy, outcome: Outcome, work: Path) -> Publication:
        import torch

        from dllm.methods.dflash.features import forget_old
        from dllm.models.drafts.checkpoint import load_draft, save_draft

        export = work / "export"
        save_draft(load_draft(outcome.checkpoint), export, getattr(torch, ctx.params.train.compute_dtype))
        forget_old(ctx.root / FEATURES)
        offsets = [f"draft_acc_k{k}" for k in range(1, strategy.model.config.block_size)]
        panels = [["loss"], ["acceptance_length", "walked_acceptance_length"], ["draft_acc", *offsets]]
        curves = {"accuracy": "draft_acc", "acceptance_length": "acceptance_length"}
        return Publication({name: export / name for name in ("config.json", "model.safetensors")}, panels, curves)

    def evaluate(self, ctx: EvaluateContext) -> Evaluation:
        from dllm.methods.dflash.evaluate import evaluate

        return evaluate(ctx)

    def score(self, metrics: Mapping[str, Any]) -> Score:
        measured = metrics.get("walked", metrics)
        interval = measured.get("tau_interval")
        return Score("tau_micro", "τ", measured["tau_micro"], tuple(interval) if interval else None)

    def rows(self, metrics: Records) -> Iterator[Row]:
        trained, found = metrics.get("train", {}), metrics.get("evaluate", {})
        yield "draft parameters", count(trained.get("draft_params"))
        yield "draft_acc, held-out text", number(trained.get("val_draft_acc"), 3)
        decoded = "held-out prompts"
        if walked := found.get("walked"):
            decoded = f"{found['prompts']} decoded prompts"
            low, high = walked["tau_interval"] or (None, None)
            interval = f"(95 % interval {number(low, 2)} to {number(high, 2)})"
            yield f"τ micro, {walked['prompts']} held-out prompts", f"{number(walked['tau_micro'], 2)} {interval}"
        yield f"τ micro, {decoded}", number(found.get("tau_micro"), 2)
        yield f"τ macro, {decoded}", number(found.get("tau_macro"), 2)
        if sampled := found.get("sampled"):
            yield f"τ micro, sampled at temperature {sampled['temperature']:g}", number(sampled["tau_micro"], 2)
        yield "tokens/s autoregressive", number(found.get("tokens_per_s_ar"), 1)
        yield "tokens/s speculative", number(found.get("tokens_per_s_spec"), 1)
        yield "speculative / autoregressive", f"{number(found.get('speedup'), 2)} ×"
        if (predicted := (found.get("throughput") or {}).get("predicted_speedup")) is not None:
            yield "predicted from step times", f"{number(predicted, 2)} ×"
        same = found.get("greedy_identical")
        yield "same ids as greedy, float32", DASH if same is None else "yes" if same is True else f"NO ({same})"
        if (counted := found.get("walk_identical")) is not None:
            yield "same rounds walked, float32", "yes" if counted is True else f"NO ({counted})"

    def tables(self, metrics: Records) -> Iterator[Table]:
        trained, found = metrics.get("train", {}), metrics.get("evaluate", {})
        if found.get("sets"):
            yield _sets_table(found["sets"])
        accepted = found.get("walked", found)
        if len(accepted.get("by_source", ())) > 1:
            yield _sources_table(accepted["by_source"])
        if found.get("throughput"):
            yield _throughput_table(found["throughput"])
        columns: dict[str, list[float | None]] = {
            "draft_acc_k": [],
            "accepted given k-1": accepted.get("conditional_acceptance_by_offset") or [],
            "accepted": accepted.get("acceptance_by_offset") or [],
        }
        while (accuracy := trained.get(f"val_draft_acc_k{len(columns['draft_acc_k']) + 1}")) is not None:
            columns["draft_acc_k"].append(accuracy)
        length = max(map(len, columns.values()))
        if length:
            rows = [
                {"k": k + 1} | {name: values[k] if k < len(values) else None for name, values in columns.items()}
                for k in range(length)
            ]
            yield Table(
                "acceptance-curve",
                "by offset in the block",
                "Accuracy on held-out text and acceptance on held-out prompts, by offset in the block.",
                rows,
                digits=dict.fromkeys(columns, 3),
                bar="accepted",
            )


def _sources_table(sources: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for name, each in sources.items():
        low, high = each.get("tau_interval") or (None, None)
        rows.append({"source": name, "prompts": each.get("prompts"), "τ": each["tau_micro"], "low": low, "high": high})
    about = "Acceptance length on held-out prompts of each source, with a 95 % interval."
    return Table("sources", "by source", about, rows, digits=dict.fromkeys(("τ", "low", "high"), 2))


def _throughput_table(found: Mapping[str, Any]) -> Table:
    rows = []
    last = max(int(number) for row in found["tokens_per_s"].values() for number in row)
    shown = set(range(last + 1))
    if last > MOST_COLUMNS:  # powers of two, and what is best somewhere
        shown = {0, last, *(2**k for k in range(last.bit_length())), *found["best_draft_tokens"].values()}
    for concurrency, row in by_number(found["tokens_per_s"]).items():
        best = found["best_draft_tokens"][concurrency]
        row, gain = by_number(row), row[str(best)] / row["0"]
        some = {name: value for name, value in row.items() if int(name) in shown}
        rows.append({"at once": int(concurrency), **some, "best": best, "gain": gain})
    losing = [concurrency for concurrency, best in by_number(found["best_draft_tokens"]).items() if not best]
    loses = f"drafts lose at {', '.join(losing)}" if losing else "drafts pay at every concurrency measured"
    if from_on := found["loses_from_concurrency"]:
        loses = f"drafts lose from {from_on} on"
    about = (
        "Expected tokens per second by responses decoded at once and draft tokens per round; gain is the best over "
        f"none: {loses}."
    )
    decimals = 1 if last <= MOST_COLUMNS else 0
    digits = {**dict.fromkeys(rows[0], decimals), "at once": 0, "best": 0, "gain": 2}
    return Table("throughput", "draft tokens that pay", about, rows, digits=digits)


def _sets_table(sets: Mapping[str, Any]) -> Table:
    measured = dict[str, Mapping[str, Any]]()
    for name, each in sets.items():
        measured[name] = each
        if sampled := each.get("sampled"):
            measured[f"{name}, T {sampled['temperature']:g}"] = sampled
    rows = []
    for name, each in measured.items():
        own = {"set": name, "prompts": each["prompts"], "τ": each["tau_micro"], "τ macro": each["tau_macro"]}
        for beside in each["published"] or [{"tau": None, "by": DASH, "note": None}]:
            note = f" ({beside['note']})" if beside["note"] else ""
            rows.append({**own, "published": beside["tau"], "by": beside["by"] + note})
    about = "Acceptance length on prompt sets, beside published figures of this target, draft and temperature."
    return Table("prompt-sets", "prompt sets", about, rows, digits=dict.fromkeys(("τ", "τ macro", "published"), 2))


DFLASH: Method[Dflash] = DflashMethod()
