"""params.yaml as typed, strict, frozen models: one class a section.

Owns what may stand in params.yaml and which combinations make sense. Environment variables never change what a
stage computes; the machine facts they carry are listed in docs/operations.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from dllm.config.diffusion import DiffusionEvaluation, Hybrid, Mdlm
from dllm.config.section import Fraction, NonNegativeInt, PositiveInt, Section
from dllm.registry import ENGINES


class Target(Section):
    """The causal model a draft learns to foresee, or that becomes a diffusion model."""

    model: str
    """`builtin:smollm2-135m-instruct`, `builtin:tiny`, a directory, or a Hugging Face id."""
    revision: str | None = None
    """Commit of the Hugging Face repository; null takes the newest, and records it."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    trust_remote_code: bool = False
    """Run code that comes with the model; from the hub only at a commit that `revision` names in full."""
    enable_thinking: bool | None = None
    """Passed to the chat template by templates that know it; null leaves it out."""


class Source(Section):
    """Where prompts come from."""

    name: str
    """`gsm8k`, `humaneval`, `aime`, `arithmetic` (built in), a Hugging Face dataset id, or a parquet/JSON/JSONL file or
    folder."""
    split: str = "train"
    """Split of a Hugging Face dataset; slices such as `train[:1000]` are understood."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    column: str | None = None
    """Column with the chat; null takes `messages`, then `conversations`."""
    limit: PositiveInt | None = None
    """At most so many prompts, the first by id hash."""


class Prepare(Section):
    """Prompts as chats, with a held-out part that no training row can enter."""

    sources: Annotated[list[Source], Field(min_length=1)]
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of prompts kept for validation and evaluation, chosen by id hash."""


class Sglang(Section):
    """A SGLang server that `dllm serve`, or the stage with engine `sglang`, starts and takes down."""

    python: str | None = ".venv-sglang/bin/python"
    """Interpreter of the environment that has SGLang, relative to the project's folder."""
    image: str | None = None
    """A container image that has SGLang, instead of `python`."""
    port: NonNegativeInt = 0
    """0 takes a free one."""
    args: list[str] = Field(default=[])
    """Further arguments of `sglang.launch_server`, e.g. [--tp, "2"]."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Patience until the first token, in seconds."""


class Regenerate(Section):
    """The target answers every prompt."""

    engine: Annotated[str, AfterValidator(ENGINES.check)] = "local"
    """`local`: in this process; `openai`: servers that are running; `sglang`: one started for the stage; `given`:
    nothing is generated, the dataset's own last responses are taken."""
    servers: list[str] = Field(default=[])
    """Addresses of OpenAI-compatible servers, for engine `openai`; DLLM_TARGET_URL (commas between several) goes
    before them."""
    served_model: str | None = None
    """Name the servers know the target by; null takes `target.model`."""
    concurrency: PositiveInt = 64
    """Requests in flight over all servers, for engines `openai` and `sglang`."""
    batch_size: PositiveInt = 64
    """Rows decoded together, for engine `local`."""
    samples_per_prompt: PositiveInt = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: PositiveInt = 256
    shard_size: PositiveInt = 1000
    """Rows a parquet shard."""
    seed: int = 0
    turns: Literal["all", "last"] = "all"
    """`all`: every assistant turn is answered anew, each after the new ones; `last`: only the last, the others stay."""
    drop: list[Literal["length", "empty", "repetition", "tool_mismatch"]] = Field(default=[])
    """Flags whose rows are left out of the shards; they are counted all the same."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Patience with one request, and with the absence of all servers, in seconds."""
    max_retries: NonNegativeInt = 5
    """Further tries of a request after a fault that may pass."""
    max_failure_rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The run stops when a larger share of the latest rows was refused."""
    sglang: Sglang = Sglang()

    @model_validator(mode="after")
    def _samples_differ(self) -> Regenerate:
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError("samples_per_prompt > 1 at temperature 0 repeats the same answer; raise temperature")
        return self


class Draft(Section):
    """The small block-diffusion model that is trained."""

    init: str = "random"
    """`random` (sized by the target), `target` (layers start as copies of the target's last ones), or a published
    draft: a directory or a Hugging Face id."""
    num_hidden_layers: PositiveInt = 5
    num_target_layers_tapped: PositiveInt = 5
    """How many target layers are tapped, evenly spread, where `target_layer_ids` is null."""
    target_layer_ids: list[NonNegativeInt] | None = None
    """0-based decoder layers whose outputs are tapped."""
    sliding_window: PositiveInt | None = None
    """Context window of every draft layer; null sees the whole context."""


class Dflash(Section):
    """Block diffusion against target features (DFlash paper, section 4 and appendix A.1)."""

    block_size: NonNegativeInt = 16
    """Slots a block: one clean anchor and block_size - 1 masks. 0 reads the draft's."""
    loss_decay_gamma: Annotated[float, Field(ge=0)] = 0.0
    """Decay of the loss over a block's offsets. 0 takes the paper's: 7, 5, 4 for blocks of 16, 10, 8."""
    loss: Literal["decay", "dpace"] = "decay"
    """`decay`: exp(-(k-1)/gamma) weights; `dpace`: weights from the draft's own confidence (D-PACE, alpha 0.5)."""
    distill: Fraction = 0.0
    """Share of the loss that asks for the target's whole next-token distribution instead of the one token it wrote.
    0 is the paper's loss."""
    mask_token_id: NonNegativeInt | None = None
    """Id fed at masked slots; null resolves it from the tokenizer. It must be a row of the target's embedding."""
    num_blocks_per_sample: PositiveInt = 512
    """Anchors a sequence and epoch."""
    anchor_sampling: Literal["without_replacement", "with_replacement", "non_overlapping"] = "without_replacement"
    """All three draw from supervised positions; `with_replacement` is the paper's independent sampling."""
    features: Literal["cached", "online"] = "cached"
    """Target hidden states: written once to disk, or computed for every batch."""
    loss_vocab: Literal["full", "corpus"] = "full"
    """`corpus` leaves tokens that no training answer holds out of training steps, their softmax and accuracies alike;
    validation always uses all."""
    ce_chunk_size: PositiveInt = 256
    """Block positions whose logits exist at one time."""
    draft: Draft = Draft()

    @model_validator(mode="after")
    def _block_has_masks(self) -> Dflash:
        if self.block_size == 1:
            raise ValueError("block_size must be 0 (the draft's) or at least 2: a block of 1 has nothing to predict")
        if self.block_size == 0 and self.draft.init in ("random", "target"):
            raise ValueError("block_size 0 reads the draft's, but draft.init makes a new draft; name a size such as 16")
        return self


class Optimizer(Section):
    """How the trained weights move."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` moves matrices by orthogonalised momentum and everything else by AdamW."""
    lr: Annotated[float, Field(gt=0)] = 6e-4
    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.04
    """Share of all optimizer steps that warm up linearly."""


MODES = ("dflash", "mdlm", "hybrid")
"""Ways to train; each has its section in `train`."""


class Train(Section):
    """One training run under torchrun."""

    mode: Literal["dflash", "mdlm", "hybrid"] = "dflash"
    """`dflash`: a draft beside the frozen target; `mdlm` and `hybrid`: a diffusion model made of the target."""
    nproc: PositiveInt = 1
    """Ranks torchrun starts; on a machine with GPUs, one a GPU."""
    epochs: Annotated[float, Field(gt=0)] = 6.0
    batch_size: PositiveInt = 8
    """Sequences a rank and micro-batch."""
    grad_accumulation: PositiveInt = 1
    max_length: PositiveInt = 3072
    """Longest sequence in tokens; what is longer is cut on the right."""
    seed: int = 0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the forward and backward pass; master weights are float32."""
    log_every: PositiveInt = 10
    """Optimizer steps between metrics."""
    validate_every: PositiveInt = 100
    """Optimizer steps between looks at held-out text; a checkpoint follows each."""
    validation_samples: PositiveInt = 64
    """Held-out sequences in a validation."""
    keep_checkpoints: PositiveInt = 2
    optimizer: Optimizer = Optimizer()
    dflash: Dflash = Dflash()
    mdlm: Mdlm = Mdlm()
    hybrid: Hybrid = Hybrid()

    @model_serializer(mode="wrap")
    def _own_mode_only(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the other modes' sections: they shape nothing, and must not ask for a rerun."""
        sections: dict[str, Any] = write(self)
        return {key: value for key, value in sections.items() if key not in MODES or key == self.mode}


class Evaluate(Section):
    """Real decoding on held-out prompts: speculative for a draft, parallel for a diffusion model."""

    num_prompts: PositiveInt = 64
    """Held-out prompts of each source."""
    max_new_tokens: PositiveInt = 256
    block_size: NonNegativeInt = 0
    """Slots a round at decoding; 0 takes the draft's. Smaller than the draft's is allowed."""
    identity_prompts: NonNegativeInt = 4
    """Prompts decoded again in float32 to check that speculative ids equal autoregressive ids."""
    diffusion: DiffusionEvaluation | None = None
    """For modes `mdlm` and `hybrid`; null takes the defaults."""

    @model_serializer(mode="wrap")
    def _without_absent(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        sections: dict[str, Any] = write(self)
        return {key: value for key, value in sections.items() if key != "diffusion" or value is not None}


class Register(Section):
    """The checkpoint as a version of an MLflow registered model."""

    model_name: str
    """Registered model the checkpoint becomes a version of."""


class Params(Section):
    """params.yaml, whole."""

    recipe: str
    """Name of the recipe these values came from."""
    target: Target
    prepare: Prepare
    regenerate: Regenerate = Regenerate()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    register_: Register = Field(alias="register")

    @model_validator(mode="after")
    def _fit(self) -> Params:
        block = self.train.dflash.block_size
        if self.train.mode == "dflash" and block and self.evaluate.block_size > block:
            raise ValueError(
                f"evaluate.block_size is {self.evaluate.block_size}, larger than train.dflash.block_size {block}; "
                "a draft does not reach past the block it was trained on"
            )
        if self.evaluate.block_size == 1:
            raise ValueError("evaluate.block_size must be 0 (the draft's) or at least 2")
        cache = "none" if self.evaluate.diffusion is None else self.evaluate.diffusion.cache
        if self.train.mode == "hybrid" and self.train.hybrid.attention == "block" and cache != "none":
            raise ValueError(
                f"evaluate.diffusion.cache is {cache}, and a hybrid with attention block is decoded over a cache of "
                "its own; set it to none"
            )
        return self
