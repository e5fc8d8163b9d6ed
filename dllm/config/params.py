"""params.yaml as typed, strict, frozen pydantic models: one class per section.

The settings of training methods live with the methods; here they become optional sections of `train` and `evaluate`,
built from the registry. Environment variables never change what a stage computes; those that exist are listed in
docs/operations.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dllm.config.names import model_name, recipe_name
from dllm.config.regenerate import Regenerate
from dllm.config.section import (
    Fraction,
    NonNegativeInt,
    PositiveInt,
    Section,
    Seed,
    Size,
    TokenCount,
    with_sections,
)
from dllm.registry import METHODS


class Target(Section):
    """The causal language model that a draft is trained for, or that is turned into a diffusion model."""

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

    name: Annotated[str, Field(pattern=r"\S")]
    """`gsm8k`, `humaneval`, `aime`, `arithmetic`, `reasoning-gym` (built in), a Hugging Face dataset id, or a file or
    folder of parquet, Arrow, JSON or JSON Lines."""
    split: str = "train"
    """Split of a Hugging Face dataset, where slices such as `train[:1000]` are understood, or of a folder whose files
    are named after splits."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset, or task of `reasoning-gym`, such as `gsm_symbolic`."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face dataset; null takes the newest."""
    column: str | None = None
    """Column with the chat; null takes `messages`, then `conversations`."""
    ignore_columns: list[str] | None = None
    """Columns that are left out although they belong to the prompt, such as `input`; null ignores none."""
    max_bad_rows: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of rows that may be set aside because they cannot be read; null allows 1 %."""
    size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Prompts to generate, duplicates included, where a source generates them; null takes 1,000."""
    seed: Seed | None = None
    """Seed of a source that generates; null takes 0."""
    limit: PositiveInt | None = None
    """At most so many prompts, the first by id hash."""


class Prepare(Section):
    """Prompts as chats, with a held-out part that no training row can enter."""

    sources: Annotated[list[Source], Field(min_length=1)]
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of prompts kept for validation and evaluation, chosen by id hash."""


Beta = Annotated[float, Field(ge=0, lt=1)]
"""Decay of a running average per optimizer step."""


class Optimizer(Section):
    """The optimizer of the trained weights, and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` updates matrices with orthogonalised momentum and all other parameters with AdamW."""
    lr: Annotated[float, Field(gt=0, le=10)] = 6e-4
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.04
    """Fraction of optimizer steps with linear warm-up."""


class _Train(Section):
    """One training run: what every method shares."""

    mode: Annotated[str, AfterValidator(METHODS.check)] = next(iter(METHODS))
    """The training method; its settings are the section of that name."""
    nproc: Annotated[int, Field(ge=1, le=256)] = 1
    """Ranks that `train` starts on this machine; where it has GPUs, at most one per GPU."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 6.0
    batch_size: Size = 8
    """Sequences per rank and micro-batch."""
    grad_accumulation: Size = 1
    max_length: TokenCount = 3072
    """Maximum sequence length in tokens; longer sequences are truncated on the right."""
    seed: Seed = 0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the forward and backward pass; master weights are float32. A CPU without instructions for bfloat16
    computes in float32."""
    log_every: PositiveInt = 10
    """Optimizer steps between metrics."""
    validate_every: PositiveInt = 100
    """Optimizer steps between validations on held-out sequences; a checkpoint follows each."""
    validation_samples: PositiveInt = 64
    """Held-out sequences per validation."""
    keep_checkpoints: PositiveInt = 2
    optimizer: Optimizer = Optimizer()

    @property
    def method_settings(self) -> Section:
        """The section of the method that `mode` names."""
        section: Section = getattr(self, self.mode)
        return section

    @model_validator(mode="before")
    @classmethod
    def _fill_method_section(cls, data: Any) -> Any:
        """Give the method that trains its defaults where params.yaml has no section for it."""
        if not isinstance(data, dict):
            return data
        mode = data.get("mode", cls.model_fields["mode"].default)
        return {**data, mode: {}} if mode in METHODS and data.get(mode) is None else data

    @model_validator(mode="after")
    def _drop_other_methods(self) -> Self:
        """Check the sections of other methods, and leave them out: they do not affect this run or its digest."""
        for name in METHODS:
            if name != self.mode:
                self.__dict__[name] = None
        return self


def _named(entries: Any) -> Any:
    """Let a name stand for a source without options."""
    is_list = isinstance(entries, list)
    return [{"name": each} if isinstance(each, str) else each for each in entries] if is_list else entries


class _Evaluate(Section):
    """Decoding of held-out prompts: what every method shares."""

    num_prompts: PositiveInt = 64
    """Held-out prompts per source."""
    sets: Annotated[list[Source] | None, BeforeValidator(_named)] = None
    """Prompt sets to measure on beside the held-out prompts: `gsm8k`, `math500`, `humaneval`, `mbpp`, `mt-bench`,
    `alpaca` (as published), or sources as in `prepare.sources`; names, or mappings with `name` and `limit`. Of each set
    and thinking mode `walk.prompts` prompts are taken (`num_prompts` where that is 0)."""
    thinking: Annotated[list[bool], Field(min_length=1, max_length=2)] | None = None
    """Thinking modes in which each set is measured; null takes `target.enable_thinking` alone."""
    max_new_tokens: TokenCount = 256
    block_size: Annotated[int, Field(ge=0, le=2**16)] = 0
    """Block size at decoding; 0 takes that of the checkpoint. A draft may be decoded with smaller blocks than its
    own."""
    identity_prompts: NonNegativeInt = 4
    """Prompts decoded again in float32 to check that speculative and autoregressive decoding give the same ids."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Above 0, held-out prompts are decoded by sampling as well, and its acceptance length is reported beside that of
    greedy decoding; null leaves it out."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the target's smallest set of tokens with this probability; null takes all."""
    top_k: PositiveInt | None = None
    """Sample from so many of the target's most probable tokens; null takes all."""

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.temperature and self.temperature < 1e-6:
            raise ValueError("temperature must be 0, or a number from 1e-6 to 2")
        if not self.temperature and (self.top_p or self.top_k):
            raise ValueError("top_p and top_k require sampling, which temperature leaves out; raise temperature")
        return self


if TYPE_CHECKING:  # the sections of methods are typed where they are used, in dllm/methods/

    class Train(_Train):
        """One training run, with a section per method."""

    class Evaluate(_Evaluate):
        """Decoding of held-out prompts, with the sections that methods add."""

else:
    Train = with_sections(
        _Train,
        "Train",
        {name: method.settings for name, method in METHODS.items()},
        "Settings of the method of this name; required by no other mode.",
    )
    Evaluate = with_sections(
        _Evaluate,
        "Evaluate",
        {name: section for _, method in METHODS.items() for name, section in method.evaluation.items()},
        "Further settings of the methods that read them; null takes the defaults.",
    )


class Register(Section):
    """The checkpoint as a version of an MLflow registered model."""

    model_name: Annotated[str, AfterValidator(model_name)]
    """Registered model the checkpoint becomes a version of."""
    store: str | None = None
    """Where its bytes are kept: `mlflow`, MLflow's own artifacts; a folder; an address such as s3://BUCKET/PREFIX. null
    takes registered/ in the project, and `mlflow` where MLflow is a server."""


class Params(Section):
    """params.yaml, whole."""

    recipe: Annotated[str, AfterValidator(recipe_name)]
    """Name of the recipe these values came from; the MLflow experiment and its folder have the same name."""
    target: Target
    prepare: Prepare
    regenerate: Regenerate = Regenerate()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    register_: Register = Field(alias="register")

    @model_validator(mode="after")
    def _check_together(self) -> Params:
        if self.evaluate.block_size == 1:
            raise ValueError("evaluate.block_size must be 0 (that of the checkpoint) or at least 2")
        modes = self.evaluate.thinking or []
        if len(modes) != len(set(modes)):
            raise ValueError("evaluate.thinking names a mode twice")
        sets = [(each.name, each.subset) for each in self.evaluate.sets or []]
        if len(sets) != len(set(sets)):
            raise ValueError("evaluate.sets names a set twice")
        if modes and not sets:
            raise ValueError("evaluate.thinking is for evaluate.sets, and there are none; leave it out")
        METHODS[self.train.mode].check(self)
        return self
