"""The methods `mdlm` and `hybrid`: the target becomes a masked diffusion language model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from dllm.config.section import Section
from dllm.methods.diffusion.settings import LEVELS, DiffusionEvaluation, Hybrid, Masking, Mdlm
from dllm.methods.figures import Records, Row, Table, count, number
from dllm.methods.method import EvaluateContext, Evaluation, Method, PlanContext, Publication, Score, TrainContext

if TYPE_CHECKING:
    from dllm.config.params import Params, Train
    from dllm.methods.diffusion.masked import MaskedStrategy
    from dllm.models.diffusion.protocol import DiffusionLM
    from dllm.training.batches import Example
    from dllm.training.loop import Outcome
    from dllm.training.plan import Plan
    from dllm.training.strategy import Split

Settings = TypeVar("Settings", bound=Masking)

SECTION = "diffusion"
"""The section of `evaluate` that both methods read."""
HELDOUT = Path("out", "train", "evaluation")


class MaskedMethod(Generic[Settings]):
    """Train with masks, bound the likelihood of held-out responses, and decode held-out prompts in several ways."""

    settings: type[Settings]
    evaluation: Mapping[str, type[Section]] = {SECTION: DiffusionEvaluation}
    reads: Mapping[str, str] = {"references": "out/prepare/references.json", "heldout": HELDOUT.as_posix()}

    def check(self, params: Params) -> None:
        """Refuse what is measured of drafts alone."""
        if params.evaluate.sets is not None:
            mode = params.train.mode
            raise ValueError(f"evaluate.sets measures acceptance of drafts, and train.mode is {mode}; leave it out")
        if params.evaluate.temperature:
            raise ValueError(
                f"evaluate.temperature is {params.evaluate.temperature:g}, and a diffusion LM is evaluated greedily; "
                "set it to 0"
            )

    def check_models(self, params: Params) -> None:
        from dllm.methods.diffusion.build import check_family
        from dllm.models.target_config import check_config, check_logits
        from dllm.models.targets import locate

        check_family(params.target, params.train)
        path = locate(params.target, weights=False)
        check_config(params.target, path)
        check_logits(params.target, path, "training a diffusion LM")

    def identity(self, params: Params) -> Mapping[str, Any]:
        return {}

    def plan(self, ctx: PlanContext[Settings]) -> Plan:
        from dllm.methods.diffusion.plan import plan

        return plan(ctx)

    def strategy(
        self, model: DiffusionLM, splits: Mapping[Split, Sequence[Example]], settings: Train
    ) -> MaskedStrategy:
        """Join model and data for the training loop."""
        raise NotImplementedError

    def build(self, ctx: TrainContext[Settings]) -> MaskedStrategy:
        from dllm.methods.diffusion.build import initial_model

        model = initial_model(ctx.params.target, ctx.params.train, ctx.ranks.device)
        return self.strategy(model, ctx.splits, ctx.params.train)

    def sizes(self, strategy: MaskedStrategy) -> dict[str, int | None]:
        model = strategy.model
        size = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {"params": size, "trained_params": trained, "block_size": model.config.block_size}

    def panels(self) -> list[list[str]]:
        """Return the panels of curves.png."""
        levels = [f"masked_acc_p{100 * (level + 1) // LEVELS}" for level in range(LEVELS)]
        return [["loss"], ["nelbo", "masked_ce"], ["masked_acc"], levels]

    def publish(
        self, ctx: TrainContext[Settings], strategy: MaskedStrategy, outcome: Outcome, work: Path
    ) -> Publication:
        import torch

        from dllm.methods.diffusion.evaluate import write_heldout
        from dllm.models.diffusion import lora

        export = work / "export"
        shutil.rmtree(export, ignore_errors=True)  # a killed call may have left a part of one
        strategy.export(outcome.checkpoint, export, getattr(torch, ctx.params.train.compute_dtype))
        adapter = {f"adapter/{name}": outcome.checkpoint / name for name in lora.FILES}
        return Publication(
            {path.name: path for path in sorted(export.iterdir())},
            self.panels(),
            {"accuracy": "masked_acc"},
            write_heldout(ctx.root / "out" / "regenerate", work / "evaluation"),
            {name: path for name, path in adapter.items() if path.is_file()},
        )

    def evaluate(self, ctx: EvaluateContext) -> Evaluation:
        from dllm.methods.diffusion.evaluate import evaluate

        settings = getattr(ctx.params.evaluate, SECTION) or DiffusionEvaluation()
        return evaluate(ctx, ctx.root / HELDOUT, settings, self.settings.predicts_next)

    def score(self, metrics: Mapping[str, Any]) -> Score:
        return Score("score", metrics["score_is"], metrics["score"])

    def rows(self, metrics: Records) -> Iterator[Row]:
        trained, found = metrics.get("train", {}), metrics.get("evaluate", {})
        yield "parameters", f"{count(trained.get('params'))} ({count(trained.get('trained_params'))} trained)"
        yield "masked_acc, held-out text", number(trained.get("val_masked_acc"), 3)
        bound, error = number(found.get("nelbo"), 4), number(found.get("nelbo_se"), 4)
        yield "NELBO, held-out responses", f"{bound} ± {error} nats per token"
        yield "masked_acc, held-out responses", number(found.get("masked_acc"), 3)
        yield "correct final answers", number(found.get("answers_right"), 3)
        unseen = number(found.get("words_unseen_exact"), 3)
        yield "correct words", f"{number(found.get('words_exact'), 3)} (unseen in training: {unseen})"
        yield "same, decoded in parallel", number(found.get("parallel_words_exact"), 3)
        yield "tokens per pass, in parallel", number(found.get("parallel_tokens_per_pass"), 2)
        yield "tokens/s, in parallel", number(found.get("parallel_tokens_per_s"), 1)

    def tables(self, metrics: Records) -> Iterator[Table]:
        decodings = metrics.get("evaluate", {}).get("decodings") or []
        columns = {
            "words": ("words_exact", 3),
            "answers": ("answers_exact", 3),
            "final answer": ("answers_right", 3),
            "tokens/pass": ("tokens_per_pass", 2),
            "tokens/s": ("tokens_per_s", 1),
        }
        if all(way.get("answers_right") is None for way in decodings):  # no source knows its correct answers
            del columns["final answer"]
        if decodings:
            rows = [
                {"way": way["way"]} | {name: way.get(key) for name, (key, _) in columns.items()} for way in decodings
            ]
            digits = {name: digits for name, (_, digits) in columns.items()}
            about = "Held-out prompts, decoded in each way: fraction correct, and speed."
            yield Table("decodings", "held-out, fraction correct", about, rows, digits)


class MdlmMethod(MaskedMethod[Mdlm]):
    """Masked diffusion (LLaDA, LLaDA2)."""

    settings = Mdlm

    def strategy(
        self, model: DiffusionLM, splits: Mapping[Split, Sequence[Example]], settings: Train
    ) -> MaskedStrategy:
        """Join model and data for the training loop."""
        from dllm.methods.diffusion.mdlm import MdlmStrategy

        return MdlmStrategy(model, splits, settings)


class HybridMethod(MaskedMethod[Hybrid]):
    """Masked diffusion and next-token prediction with the same weights (Nemotron-Labs-Diffusion)."""

    settings = Hybrid

    def check(self, params: Params) -> None:
        super().check(params)
        evaluation = getattr(params.evaluate, SECTION) or DiffusionEvaluation()
        if cast(Hybrid, params.train.method_settings).attention == "block" and evaluation.cache != "none":
            raise ValueError(
                f"evaluate.diffusion.cache is {evaluation.cache}, and a hybrid with attention block is decoded with a "
                "cache of its own; set it to none"
            )

    def strategy(
        self, model: DiffusionLM, splits: Mapping[Split, Sequence[Example]], settings: Train
    ) -> MaskedStrategy:
        """Join model and data for the training loop."""
        from dllm.methods.diffusion.hybrid import HybridStrategy

        return HybridStrategy(model, splits, settings)

    def panels(self) -> list[list[str]]:
        """Return the panels of curves.png, with one for the terms of the loss."""
        loss, *others = super().panels()
        return [loss, ["diffusion_loss", "ar_loss"], *others]

    def rows(self, metrics: Records) -> Iterator[Row]:
        yield from super().rows(metrics)
        nll = number(metrics.get("evaluate", {}).get("ar_nll"), 4)
        yield "NLL as autoregressive model", f"{nll} nats per token"


MDLM: Method[Mdlm] = MdlmMethod()
HYBRID: Method[Hybrid] = HybridMethod()
