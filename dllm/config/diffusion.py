"""The sections of params.yaml that belong to diffusion language models; `dllm.config.params` holds the rest."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dllm.config.section import NonNegativeInt, PositiveInt, Section


class Lora(Section):
    """Low-rank matrices that are trained in place of the weights, which stay in train.compute_dtype."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    """What the matrices add is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[str], Field(min_length=1)]
    """Last parts of the names of the linear maps that get them, such as q_proj."""


class Masking(Section):
    """What `mdlm` and `hybrid` share: how answers are masked and what the model is told of them."""

    init: Literal["target", "random"] = "target"
    """`target`: the target's own weights, its causal mask lifted; `random`: its shape and tokenizer only."""
    mask_token_id: NonNegativeInt | None = None
    """Id fed at masked places; null takes the tokenizer's mask token, or adds one."""
    eps: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """Smallest chance of being masked: p = (1 - eps) t + eps."""
    at_least_one: bool = True
    """Leave no row (no block) without a mask; weights then use the chance under that condition, so that the loss stays
    unbiased. False draws plainly."""
    time_sampling: Literal["low_discrepancy", "independent"] = "low_discrepancy"
    """`low_discrepancy` spreads noise levels evenly over the rows of an epoch and the blocks of a row."""
    attention: Literal["full", "block"] = "full"
    """`full`: noisy text alone, every token sees every other; `block`: noisy blocks that see the clean text before
    them, each with its own noise level."""
    block_size: Annotated[int, Field(ge=1)] | None = None
    """Tokens a block, for attention `block` and corruption `exact_count`."""
    eos_padding: NonNegativeInt = 0
    """Finished answers are filled with their end token up to a multiple of so many tokens; the fill is masked and
    scored like text. 0 fills nothing."""
    ce_chunk_size: PositiveInt = 512
    """Scored tokens whose logits exist at one time."""
    lora: Lora | None = None
    """Train adapters instead of the weights; null trains the weights."""
    fsdp: bool = False
    """Split weights, gradients and moments over the ranks (FSDP2), instead of each having them all."""
    activation_checkpointing: bool = False
    """Keep only what goes into each layer for the backward pass, and run the layers again there."""

    @model_validator(mode="after")
    def _blocks_have_a_size(self) -> Masking:
        if self.attention == "block" and self.block_size is None:
            raise ValueError("attention block needs a block_size, such as 32")
        if self.lora is not None and self.init == "random":
            raise ValueError("lora adapts weights that are there; set init to target")
        if self.lora is not None and self.fsdp:
            raise ValueError("fsdp splits what is trained, and lora trains little; leave one of them out")
        return self


class Mdlm(Masking):
    """Masked diffusion (LLaDA, LLaDA2): cross-entropy on masked tokens over their chance of being masked."""

    normaliser: Literal["token", "sequence", "batch"] = "token"
    """What the summed loss is divided by: all supervised tokens; each row's own, then rows; rows alone."""
    complementary: bool = False
    """Train on each mask and on its complement, so that every token is scored once a pair. at_least_one then has no
    say: a pair always has a mask."""

    @model_validator(mode="after")
    def _a_block_size_has_a_say(self) -> Mdlm:
        if self.block_size is not None and self.attention == "full":
            raise ValueError("block_size changes nothing with attention full; set attention to block, or leave it out")
        return self


class Hybrid(Masking):
    """Masked diffusion and next-token prediction by the same weights (Nemotron-Labs-Diffusion)."""

    ar_loss_alpha: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the DIFFUSION term, whatever the name (NeMo AutoModel's); the autoregressive term has weight 1."""
    corruption: Literal["uniform", "exact_count"] = "uniform"
    """`exact_count`: a drawn share of each block is masked, later places sooner."""
    half_life_ratio: Annotated[float, Field(gt=0)] = 0.25
    """For exact_count: share of a block over which a place's odds of staying clean halve."""

    @model_validator(mode="after")
    def _counts_need_blocks(self) -> Hybrid:
        if self.corruption == "exact_count" and self.block_size is None:
            raise ValueError("corruption exact_count needs a block_size, such as 32")
        if self.block_size is not None and self.attention == "full" and self.corruption == "uniform":
            raise ValueError(
                "block_size changes nothing with attention full and corruption uniform; set attention to block or "
                "corruption to exact_count, or leave it out"
            )
        return self


class DiffusionEvaluation(Section):
    """What `evaluate` asks of a diffusion model, beside decoding held-out prompts."""

    likelihood_answers: PositiveInt = 64
    """Held-out answers whose likelihood is bounded."""
    likelihood_samples: Annotated[int, Field(ge=2)] = 32
    """Masks drawn an answer; two at least, for their error to be known."""
    batch_size: PositiveInt = 32
    """Masked answers, or prompts, in one pass."""
    thresholds: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[0.9])
    """Prompts are decoded once for each confidence above which tokens stay, and once for each of `steps`."""
    steps: Annotated[list[PositiveInt | None], Field(min_length=1)] = Field(default=[None])
    """Passes an answer takes where no threshold says so; null takes one a token. The first is the plain way."""
    cache: Literal["none", "prefix", "dual", "block"] = "none"
    """Keys and values kept while a block is written by sampler llada with a threshold; others have their own."""
    score: Literal["nelbo", "words", "answers"] = "nelbo"
    """What makes a champion: the bound on held-out answers; or, in the plain way of decoding, the share of their words
    that are met, or of answers that are right (as the source knows it, else word for word)."""
