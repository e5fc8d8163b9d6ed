"""Settings of the methods `mdlm` and `hybrid`: their sections of `train`, and `evaluate.diffusion`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dllm.config.lora import Lora
from dllm.config.section import NonNegativeInt, PositiveInt, Section, Size, TokenCount

LEVELS = 10
"""Bins of the noise level, in which accuracies are measured."""


class Masking(Section):
    """What `mdlm` and `hybrid` share: how responses are masked, and how the model is built."""

    predicts_next: ClassVar[bool] = False
    """Whether the method also trains next-token prediction, with clean text under a causal mask."""

    init: Literal["target", "random"] = "target"
    """`target`: the weights of the target, without its causal mask; `random`: only its architecture and tokenizer."""
    mask_token_id: NonNegativeInt | None = None
    """Mask token id; null takes the mask token of the tokenizer, or adds one."""
    eps: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """Smallest masking probability: p = (1 - eps) t + eps."""
    at_least_one: bool = True
    """Mask at least one token of each row (each block); weights then use the conditional probability, so that the loss
    stays unbiased. False draws every token independently."""
    time_sampling: Literal["low_discrepancy", "independent"] = "low_discrepancy"
    """`low_discrepancy` spaces noise levels evenly over the rows of an epoch and the blocks of a row."""
    attention: Literal["full", "block"] = "full"
    """`full`: bidirectional attention over the noisy sequence; `block`: each noisy block attends to itself and to the
    clean text before it, and has its own noise level."""
    block_size: TokenCount | None = None
    """Tokens per block, for attention `block` and corruption `exact_count`."""
    eos_padding: Annotated[int, Field(ge=0, le=2**24)] = 0
    """Responses that end are padded with their end token to a multiple of this length; the padding is masked and scored
    like text. 0 pads nothing."""
    ce_chunk_size: TokenCount = 512
    """Scored tokens per chunk of the cross-entropy, whose logits exist at one time."""
    lora: Lora | None = None
    """Train LoRA adapters; null trains the weights."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer moments over the ranks (FSDP2)."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each layer, and recompute the layers in the backward pass."""

    @model_validator(mode="after")
    def _blocks_have_a_size(self) -> Masking:
        if self.attention == "block" and self.block_size is None:
            raise ValueError("attention block requires a block_size, such as 32")
        if self.lora is not None and self.init == "random":
            raise ValueError("lora adapts the weights of the target; set init to target")
        if self.lora is not None and self.fsdp:
            raise ValueError("lora cannot be combined with fsdp, which shards trained weights; remove one of them")
        return self


class Mdlm(Masking):
    """Masked diffusion (LLaDA, LLaDA2): cross-entropy of masked tokens, divided by their masking probability."""

    normaliser: Literal["token", "sequence", "batch"] = "token"
    """Denominator of the summed loss: `token`, supervised tokens; `sequence`, supervised tokens of each row, then rows;
    `batch`, rows."""
    complementary: bool = False
    """Train on each mask and on its complement, so that every token is scored once per pair. at_least_one then has no
    effect: a pair always masks something."""

    @model_validator(mode="after")
    def _block_size_has_an_effect(self) -> Mdlm:
        if self.block_size is not None and self.attention == "full":
            raise ValueError("block_size has no effect with attention full; set attention to block, or remove it")
        return self


class Hybrid(Masking):
    """Masked diffusion and next-token prediction with the same weights (Nemotron-Labs-Diffusion)."""

    predicts_next: ClassVar[bool] = True

    ar_loss_alpha: Annotated[float, Field(ge=0, le=1e6)] = 0.3
    """Weight of the DIFFUSION term, despite its name (from NeMo AutoModel); the autoregressive term has weight 1."""
    corruption: Literal["uniform", "exact_count"] = "uniform"
    """`exact_count`: a random fraction of each block is masked, with later positions more probable."""
    half_life_ratio: Annotated[float, Field(gt=0, le=1e6)] = 0.25
    """For exact_count: fraction of a block over which the odds of staying clean halve."""

    @model_validator(mode="after")
    def _counts_need_blocks(self) -> Hybrid:
        if self.corruption == "exact_count" and self.block_size is None:
            raise ValueError("corruption exact_count requires a block_size, such as 32")
        if self.block_size is not None and self.attention == "full" and self.corruption == "uniform":
            raise ValueError(
                "block_size has no effect with attention full and corruption uniform; set attention to block or "
                "corruption to exact_count, or remove it"
            )
        return self


class DiffusionEvaluation(Section):
    """Evaluation of a diffusion model: likelihood bound, and the ways in which held-out prompts are decoded."""

    likelihood_answers: PositiveInt = 64
    """Held-out responses whose likelihood is bounded."""
    likelihood_samples: Annotated[int, Field(ge=2, le=2**20)] = 32
    """Masks sampled per response; at least two, to estimate the standard error."""
    batch_size: Size = 32
    """Masked responses, or prompts, per forward pass."""
    thresholds: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[0.9])
    """Confidence thresholds; prompts are decoded once with each, and once with each of `steps`."""
    steps: Annotated[list[TokenCount | None], Field(min_length=1)] = Field(default=[None])
    """Forward passes per response without a threshold; null takes one per token. The first is the baseline."""
    cache: Literal["none", "prefix", "dual", "block"] = "none"
    """KV cache of sampler llada with a threshold; other samplers have their own."""
    score: Literal["nelbo", "words", "answers"] = "nelbo"
    """Score that the registry compares: `nelbo`, the bound on held-out responses; or, in baseline decoding, the
    fraction of their `words` generated, or of correct `answers` (by reference of the source, else by exact match)."""
