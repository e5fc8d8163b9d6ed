"""Settings of the method `dflash`: the section `train.dflash` of params.yaml."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from dllm.config.section import Fraction, Layers, NonNegativeInt, Section, Size, TokenCount, with_sections
from dllm.registry import DRAFT_SETTINGS, DRAFTS, OBJECTIVES


class _Draft(Section):
    """The block-diffusion draft model that is trained."""

    architecture: Annotated[str, AfterValidator(DRAFTS.check)] = "dflash"
    """Draft architecture."""
    init: str = "random"
    """`random` (with the shapes of the target), or a trained draft: a directory, a Hugging Face id, or a registered
    one, models:/NAME/VERSION (DVC does not see an alias move). Its layers and what `dflash2` sizes are its own,
    whatever stands here; `target_layer_ids`, `sliding_window`, `layer_types` and `causal` must be its own or null."""
    revision: str | None = None
    """Commit, branch or tag of a published draft on Hugging Face; null takes the newest. The commit is recorded."""
    num_hidden_layers: Layers = 5
    num_target_layers_tapped: Layers = 5
    """Number of evenly spaced target layers whose hidden states the draft reads, if `target_layer_ids` is null."""
    target_layer_ids: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    """0-based decoder layers of the target whose outputs the draft reads."""
    sliding_window: TokenCount | None = None
    """How many positions a slot of a sliding layer sees, itself included."""
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    """Attention of each draft layer; null: all sliding with a sliding_window, all full without."""
    causal: bool | None = None
    """Whether positions of a block attend only to those before them; null: in sliding layers of DFlash, and nowhere in
    DFlash 2."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        ids = self.target_layer_ids or []
        if len(set(ids)) < len(ids):
            raise ValueError("target_layer_ids names a layer twice")
        if self.init == "random" and self.revision is not None:
            raise ValueError("revision is that of a published draft, and init is random")
        if self.layer_types is None or self.init != "random":
            return self
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types must name {self.num_hidden_layers} layers, as num_hidden_layers says")
        if (self.sliding_window is None) == ("sliding_attention" in self.layer_types):
            raise ValueError("layer_types with sliding_attention and a sliding_window need each other")
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_own_section(cls, data: Any) -> Any:
        """Give the architecture's own section its defaults, and refuse those of others: they would change nothing."""
        if not isinstance(data, dict):
            return data
        own = data.get("architecture", cls.model_fields["architecture"].default)
        for name in DRAFT_SETTINGS:
            if name != own and data.get(name) is not None:
                raise ValueError(f"{name}: settings of another architecture than {own!r}")
        return {**data, own: {}} if own in DRAFT_SETTINGS and data.get(own) is None else data


if TYPE_CHECKING:  # the sections of architectures are typed where they are used, in dllm/models/drafts/

    class Draft(_Draft):
        """The block-diffusion draft model that is trained, with the section of its architecture."""

else:
    Draft = with_sections(
        _Draft,
        "Draft",
        dict(DRAFT_SETTINGS.items()),
        "Settings of the architecture of this name; required by no other.",
    )


class Dflash(Section):
    """Block diffusion conditioned on hidden states of the target (DFlash paper, section 4 and appendix A.1)."""

    block_size: Annotated[int, Field(ge=0, le=1024)] = 16
    """Positions per block: one clean anchor and block_size - 1 masks. 0 takes the block size of a published draft."""
    loss_decay_gamma: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Decay of the loss over the offsets of a block. 0 takes the paper's value: 7, 5, 4 for blocks of 16, 10, 8."""
    loss: Annotated[str, AfterValidator(OBJECTIVES.check)] = "decay"
    """`decay`: exp(-(k-1)/gamma) weights; `dpace`: weights from the confidence of the draft (D-PACE, alpha 0.5)."""
    distill: Fraction = 0.0
    """Weight of the distillation term, the cross-entropy against the next-token distribution of the target; the
    cross-entropy against its tokens has the rest. 0 is the loss of the paper."""
    mask_token_id: NonNegativeInt | None = None
    """Mask token id; null takes it from the tokenizer. It must be a row of the target's embedding."""
    num_blocks_per_sample: Annotated[int, Field(ge=1, le=2**20)] = 512
    """Anchors per sequence and epoch."""
    anchor_sampling: Literal["without_replacement", "with_replacement", "non_overlapping"] = "without_replacement"
    """All three sample from supervised positions; `with_replacement` is the independent sampling of the paper."""
    features: Literal["cached", "online"] = "cached"
    """Hidden states of the target: cached on disk once, or computed for every batch."""
    loss_vocab: Literal["full", "corpus"] = "full"
    """`corpus` restricts softmax and accuracy of training steps to tokens that occur in training responses; validation
    always uses the full vocabulary."""
    walk_samples: NonNegativeInt = 16
    """Held-out prompts on which a validation also counts the rounds of greedy decoding, without decoding. If the
    responses are sampled, or a dataset's own, the target first generates greedy ones (`work/greedy/`)."""
    ce_chunk_size: TokenCount = 256
    """Block positions per chunk of the cross-entropy, whose logits exist at one time."""
    draft: Draft = Draft()

    @model_validator(mode="after")
    def _block_has_masks(self) -> Dflash:
        if self.block_size == 1:
            raise ValueError("block_size must be 0 (the draft's) or at least 2: a block of 1 has nothing to predict")
        window = self.draft.sliding_window
        if window is not None and window < self.block_size:
            raise ValueError(f"draft.sliding_window {window} is below block_size {self.block_size}")
        if self.block_size == 0 and self.draft.init == "random":
            raise ValueError("block_size 0 reads the draft's, but draft.init makes a new draft; name a size such as 16")
        return self


class Walk(Section):
    """Acceptance on many held-out prompts, counted on the target's own greedy responses without decoding."""

    prompts: NonNegativeInt = 128
    """Held-out prompts per source; 0 leaves it out."""
    batch_size: Size = 64
    """Prompts whose greedy responses are generated together; they are kept in `work/greedy/`."""


class Throughput(Section):
    """Which number of draft tokens pays: expected tokens per second by draft tokens and concurrency."""

    seconds: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """Wall clock for the measurement of step times; 0 leaves it out. Concurrencies that do not fit are left out."""
    concurrencies: Annotated[list[Size], Field(min_length=1, max_length=16)] = Field(default=[1, 2, 4, 8, 16, 32])
    """Responses that are decoded together, rising."""

    @model_validator(mode="after")
    def _rise(self) -> Throughput:
        if sorted(set(self.concurrencies)) != self.concurrencies:
            raise ValueError("concurrencies must rise")
        return self
