"""Stage `train`: a draft learns to foresee the target's words, or the target becomes a diffusion model.

Alone (`python -m dllm train`) or as ranks of torchrun. Composes strategy and loop; publishes the best checkpoint.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dllm.config.params import Params, Target, Train
from dllm.stages.workspace import Stage, open_stage

if TYPE_CHECKING:
    from dllm.methods.dflash.features import CachedFeatures, OnlineFeatures
    from dllm.methods.dflash.strategy import DflashStrategy
    from dllm.methods.diffusion.strategy import DiffusionStrategy
    from dllm.training.batches import Examples
    from dllm.training.distributed import Ranks
    from dllm.training.loop import Outcome
    from dllm.training.strategy import Split

FEATURES = Path("work", "features")
"""Of every configuration, the target's hidden states: gigabytes, and quicker read than made again."""


def run(params: Params, root: Path) -> dict[str, Any]:
    """Train, publish out/train/, and return its metrics.

    Raises:
        DataError: nothing is left to train on, or shards or features cannot be read.
        ModelError: the target or the draft is missing or does not fit.
        StageError: the gradient is no longer finite, or another rank was lost.
    """
    from dllm.models import targets
    from dllm.training.distributed import Join

    with Join() as ranks:
        identity = targets.identity(params.target)
        with open_stage(
            "train",
            params,
            sections=[params.target, params.train],
            inputs={"regenerate": root / "out" / "regenerate"},
            identity={"target": identity, "world": ranks.world},
            root=root,
            is_main=ranks.is_main,
        ) as stage:
            return _train(params, root, stage, ranks, identity)


def _train(params: Params, root: Path, stage: Stage, ranks: Ranks, identity: dict[str, Any]) -> dict[str, Any]:
    import torch

    from dllm.methods.dflash import features
    from dllm.methods.diffusion.strategy import DiffusionStrategy
    from dllm.training.loop import Loop

    _check_thinking(params.target, root / "out" / "regenerate")
    train, heldout = _examples(params.train, root / "out" / "regenerate")
    if ranks.is_main:
        _announce(params.train, train, heldout, ranks)
    splits: dict[Split, list[Any]] = {"train": train.kept, "heldout": heldout.kept}
    strategy: DflashStrategy | DiffusionStrategy
    if params.train.mode == "dflash":
        strategy = _dflash(params, root, ranks, identity, splits)
    else:
        strategy = _diffusion(params, ranks, splits)
    dtype = getattr(torch, params.train.compute_dtype)
    loop = Loop(strategy, params.train, ranks, work=stage.work, tracker=stage.tracker, mfu_dtype=dtype)
    outcome = loop.run()
    metrics = _metrics(strategy, outcome, train)
    if ranks.is_main:
        if isinstance(strategy, DiffusionStrategy):
            _publish_model(stage, strategy, outcome, metrics, dtype)
        else:
            _publish_draft(stage, strategy, outcome, metrics, dtype)
        features.forget_old(root / FEATURES)
    return metrics


def _dflash(
    params: Params, root: Path, ranks: Ranks, identity: dict[str, Any], splits: Mapping[Split, list[Any]]
) -> DflashStrategy:
    from dllm.methods.dflash.build import initial_draft
    from dllm.methods.dflash.features import CachedFeatures, OnlineFeatures
    from dllm.methods.dflash.strategy import DflashStrategy
    from dllm.models import targets

    settings = params.train.dflash
    target = targets.load_target(params.target, device=ranks.device)
    tokenizer = targets.load_tokenizer(params.target)
    draft = initial_draft(settings, target, tokenizer, params.train.seed).to(ranks.device)
    embedding_VD: Any = target.get_input_embeddings().weight
    head_VD: Any = target.get_output_embeddings().weight
    layer_ids = draft.config.target_layer_ids
    source: CachedFeatures | OnlineFeatures
    if settings.features == "cached":
        source = CachedFeatures(
            root / FEATURES,
            splits,
            identity=identity,
            layer_ids=layer_ids,
            dtype=params.target.dtype,
            with_last=settings.distill > 0,
        )
        source.fill(target, ranks)
    else:
        source = OnlineFeatures(target, layer_ids, splits, with_last=settings.distill > 0)
    del target  # with cached features only its embedding and head stay in memory
    return DflashStrategy(draft, embedding_VD, head_VD, splits, source, params.train)


def _diffusion(params: Params, ranks: Ranks, splits: Mapping[Split, list[Any]]) -> DiffusionStrategy:
    from dllm.methods.diffusion.build import initial_model
    from dllm.methods.diffusion.strategy import DiffusionStrategy

    model = initial_model(params.target, params.train, ranks.device)
    return DiffusionStrategy(model, splits, params.train)


def _check_thinking(target: Target, folder: Path) -> None:
    from dllm.errors import DataError
    from dllm.regeneration.identity import THINKING
    from dllm.responses.shards import read_manifest

    wanted = THINKING[target.enable_thinking]
    found = read_manifest(folder).get("thinking", wanted)
    if found != wanted:
        raise DataError(
            f"the answers were written with thinking {found}, and target.enable_thinking asks for {wanted}",
            where=str(folder),
            hint="regenerate, or set target.enable_thinking as it was",
        )


def _examples(settings: Train, folder: Path) -> tuple[Examples, Examples]:
    from dllm.errors import DataError
    from dllm.responses.shards import read_rows
    from dllm.training.batches import make_examples

    train = make_examples(read_rows(folder, "train"), settings.max_length)
    if not train.kept:
        raise DataError("no training rows", where=str(folder), hint="lower prepare.heldout_fraction or add prompts")
    # Ids are hashes, so the first by id are a fair sample, the same for every seed.
    rows = sorted(read_rows(folder, "heldout"), key=lambda row: (row.prompt_id, row.sample, row.turn))
    heldout = make_examples(rows[: settings.validation_samples], settings.max_length)
    return train, heldout


def _announce(settings: Train, train: Examples, heldout: Examples, ranks: Ranks) -> None:
    from dllm.methods.diffusion.build import masking_of

    notes = [f"{len(train.kept)} rows, {len(heldout.kept)} held out"]
    if train.dropped:
        notes.append(f"{train.dropped} dropped, with fewer than 2 supervised tokens")
    if train.cut:
        notes.append(f"{train.cut} cut at train.max_length {settings.max_length}")
    if ranks.world != settings.nproc:
        notes.append(f"{ranks.world} ranks where train.nproc says {settings.nproc}: torchrun starts as many as wanted")
    if settings.mode != "dflash" and masking_of(settings).fsdp:
        notes.append(f"weights split over {ranks.world} rank{'s' if ranks.world > 1 else ''}")
    print(f"train: {'; '.join(notes)}", file=sys.stderr, flush=True)


def _metrics(strategy: DflashStrategy | DiffusionStrategy, outcome: Outcome, train: Examples) -> dict[str, Any]:
    from dllm.methods.dflash.strategy import DflashStrategy

    size = sum(p.numel() for p in strategy.model.parameters())
    about: dict[str, int | None]
    if isinstance(strategy, DflashStrategy):
        about = {"draft_params": size, "block_size": strategy.model.config.block_size}
    else:
        trained = sum(p.numel() for p in strategy.model.parameters() if p.requires_grad)
        about = {"params": size, "trained_params": trained, "block_size": strategy.model.note.block_size}
    return {
        **outcome.validation,
        "best_step": outcome.step,
        "steps": outcome.steps,
        "rows": len(train.kept),
        "rows_dropped": train.dropped,
        "rows_cut": train.cut,
        "tokens": outcome.tokens,
        strategy.predictions_name: outcome.predictions,
        "seconds": round(outcome.seconds, 3),
        **about,
    }


def _publish_draft(
    stage: Stage, strategy: DflashStrategy, outcome: Outcome, metrics: dict[str, Any], dtype: Any
) -> None:
    from dllm.models.drafts.checkpoint import load_draft, save_draft

    export = stage.work / "export"
    save_draft(load_draft(outcome.checkpoint), export, dtype)
    offsets = [f"draft_acc_k{k}" for k in range(1, strategy.model.config.block_size)]
    panels = [["loss"], ["acceptance_length"], ["draft_acc", *offsets]]
    _publish(stage, {name: export / name for name in ("config.json", "model.safetensors")}, panels, outcome, metrics)


def _publish_model(
    stage: Stage, strategy: DiffusionStrategy, outcome: Outcome, metrics: dict[str, Any], dtype: Any
) -> None:
    from dllm.methods.diffusion.strategy import LEVELS
    from dllm.models.diffusion import lora as adapters

    export = stage.work / "export"
    shutil.rmtree(export, ignore_errors=True)  # a killed call may have left half of one
    strategy.export(outcome.checkpoint, export, dtype)
    beside = {f"adapter/{name}": outcome.checkpoint / name for name in adapters.FILES}
    beside = {name: path for name, path in beside.items() if path.is_file()}
    levels = [f"masked_acc_p{100 * (level + 1) // LEVELS}" for level in range(LEVELS)]
    panels = [["loss"], ["nelbo", "masked_ce"], ["masked_acc"], levels]
    if strategy.hybrid is not None:
        panels.insert(1, ["diffusion_loss", "ar_loss"])
    _publish(stage, {path.name: path for path in sorted(export.iterdir())}, panels, outcome, metrics, beside)


def _publish(
    stage: Stage,
    checkpoint: dict[str, Path],
    panels: list[list[str]],
    outcome: Outcome,
    metrics: dict[str, Any],
    beside: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    from dllm.training import curves, journal

    log, picture = stage.work / "training.jsonl", stage.work / "curves.png"
    curves.draw(journal.read(log), picture, panels)
    stage.tracker.log_artifact(picture)
    files = {f"checkpoint/{name}": path for name, path in checkpoint.items()} | dict(beside)
    stage.publish({**files, "training.jsonl": log, "curves.png": picture}, metrics, step=outcome.steps)
