"""What a run of the method `dflash` needs: counted from the settings and the shapes of target and draft alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dllm.methods.dflash.features import FILL_TOKENS
from dllm.methods.dflash.settings import Dflash
from dllm.methods.method import PlanContext
from dllm.models.drafts import attention
from dllm.models.drafts.checkpoint import draft_directory, read_config
from dllm.models.drafts.protocol import Draft, DraftConfig
from dllm.models.experts import weights_per_token
from dllm.models.precision import compute_dtype
from dllm.registry import DRAFTS
from dllm.training.optimizer import moment_bytes
from dllm.training.plan import LOGIT_COPIES, Plan, saved_bytes

SCORE_BYTES = 12
"""Per attention score of the largest group of blocks, in its backward pass: products and masks in bfloat16, the softmax
and its gradient in float32, less what is freed by then."""


def plan(ctx: PlanContext[Dflash]) -> Plan:
    """Count parameters, memory and operations; nothing is loaded."""
    settings, train, work, target = ctx.settings, ctx.params.train, ctx.workload, ctx.target
    config = planned_config(settings, target)
    with torch.device("meta"):
        draft: Draft = DRAFTS[settings.draft.architecture](config)
    dtype, target_dtype = (compute_dtype(each, ctx.device) for each in (train.compute_dtype, ctx.params.target.dtype))
    size = sum(parameter.numel() for parameter in draft.parameters())
    embeddings = {id(each): each for each in (_embedding(target), _head(target))}
    vocab, hidden = _head(target).shape
    rows = train.batch_size
    blocks = min(settings.num_blocks_per_sample, work.longest)
    width = hidden * (len(config.target_layer_ids) + (settings.distill > 0))
    saved = draft_bytes(draft, rows, work.longest, blocks, dtype)
    scores = rows * blocks * config.block_size * getattr(config, "num_attention_heads", 1)
    scores *= work.longest + config.block_size
    group = min(scores, attention.SCORES_AT_ONCE) * SCORE_BYTES * dtype.itemsize // 2
    logits = min(settings.ce_chunk_size, rows * blocks * config.block_size) * vocab * LOGIT_COPIES * dtype.itemsize
    kept = list(embeddings.values()) if settings.features == "cached" else list(target.parameters())
    frozen = sum(parameter.numel() for parameter in {id(each): each for each in kept}.values()) * target_dtype.itemsize
    if dtype is not target_dtype:
        frozen += sum(each.numel() for each in embeddings.values()) * dtype.itemsize
    memory = {
        "target": frozen,
        "draft weights": 4 * size,
        "optimizer": moment_bytes(draft, train.optimizer, draft.adamw_rates(settings.draft)),
        "features": rows * work.longest * width * dtype.itemsize,
    }
    if settings.features == "online":
        memory["features"] += _forward_bytes(target, rows * work.longest, target_dtype)
    activations = saved + max(group, logits)
    if train.grad_accumulation > 1 or ctx.ranks > 1:
        memory |= {"gradients": 4 * size, "activations": activations}
    else:  # one grows as the other shrinks
        memory["activations, then gradients"] = max(4 * size, activations)
    whole = sum(parameter.numel() for parameter in target.parameters()) * target_dtype.itemsize
    loading = whole + 4 * size + _forward_bytes(target, FILL_TOKENS, target_dtype)
    sequences = train.batch_size * train.grad_accumulation * ctx.ranks
    anchors = sequences * min(settings.num_blocks_per_sample, work.supervised)
    draft_flops = draft.train_flops(
        context_tokens=round(sequences * work.length),
        blocks=round(anchors),
        visible_tokens=round(anchors * (work.length - work.supervised / 2)),
        predictions=round(anchors * (config.block_size - 1)),
        vocab=vocab,
    )
    features = forward_flops(target, work.length)
    step = {"draft": draft_flops}
    once = 0.0
    if settings.features == "online":
        step["target's features"] = sequences * features
    else:
        once = work.rows * features
    notes = ["validation, checkpoints and the time of reading data are not counted"]
    if settings.loss_vocab == "corpus":
        notes.append("loss_vocab: corpus has a smaller head, of a size that the responses decide")
    models = {"draft": size, "target, frozen": sum(parameter.numel() for parameter in target.parameters())}
    return Plan(models, memory, step, once, 0 if settings.features == "online" else loading, notes)


def planned_config(settings: Dflash, target: Any) -> DraftConfig:
    """Size the draft as training will; the mask id, which needs a tokenizer, changes no size."""
    family: type[Draft] = DRAFTS[settings.draft.architecture]
    if settings.draft.init != "random":
        published = read_config(draft_directory(settings.draft.init, settings.draft.revision))
        config = family.start_config(*published, settings.draft)
        return config.with_block_size(settings.block_size) if settings.block_size else config
    mask_id = settings.mask_token_id or 0
    return family.config_for(target.config, settings.draft, block_size=settings.block_size, mask_token_id=mask_id)


def draft_bytes(draft: Draft, rows: int, length: int, blocks: int, dtype: torch.dtype) -> int:
    """Count what a draft's forward pass keeps for the backward pass, without weights and features.

    Rows cost the same each. One that fills several groups of blocks by itself does so in any batch: then two rows are
    counted, and the rest follows.
    """
    config = draft.config
    scores = blocks * config.block_size * getattr(config, "num_attention_heads", 1) * (length + config.block_size)
    if rows > 2 and scores > attention.SCORES_AT_ONCE:
        one, two = (draft_bytes(draft, few, length, blocks, dtype) for few in (1, 2))
        return one + (rows - 1) * (two - one)
    width = config.hidden_size * len(config.target_layer_ids)
    with torch.device("meta"):
        features_BSF = torch.empty(rows, length, width, dtype=dtype)
        embeds_BNLD = torch.empty(rows, blocks, config.block_size, config.hidden_size, dtype=dtype)
        anchor_BN = torch.empty(rows, blocks, dtype=torch.int64)
        keep_BN = torch.empty(rows, blocks, dtype=torch.bool)
    saved = saved_bytes(
        lambda: draft(embeds_BNLD, features_BSF, anchor_BN, keep_BN), [features_BSF, *draft.parameters()]
    )
    # The loss gathers the slots that have a label, and forms their gradient while their logits exist.
    return saved + 3 * embeds_BNLD.numel() * dtype.itemsize


def forward_flops(target: Any, length: float) -> float:
    """Count the operations of the target's layers for a row: its products, and the half of attention that is causal.

    Of routed experts those count that a token is routed to.
    """
    config, decoder = target.config.get_text_config(), target.get_decoder()
    embedding = _embedding(target)
    used = weights_per_token(decoder, config)
    weights = sum(number for each, number in used if each.ndim > 1 and each is not embedding)
    heads = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return 2.0 * weights * length + 2.0 * length**2 * config.num_hidden_layers * heads


def _forward_bytes(target: Any, tokens: int, dtype: torch.dtype) -> int:
    """Estimate what the target's forward pass holds beside its features: the widest layer's inner states."""
    config = target.config.get_text_config()
    inner = 3 * getattr(config, "intermediate_size", 4 * config.hidden_size) + 4 * config.hidden_size
    return tokens * inner * dtype.itemsize


def _embedding(target: Any) -> nn.Parameter:
    weight: nn.Parameter = target.get_input_embeddings().weight
    return weight


def _head(target: Any) -> nn.Parameter:
    weight: nn.Parameter = _embedding(target) if _is_tied(target) else target.get_output_embeddings().weight
    return weight


def _is_tied(target: Any) -> bool:
    return bool(getattr(target.config.get_text_config(), "tie_word_embeddings", False))
