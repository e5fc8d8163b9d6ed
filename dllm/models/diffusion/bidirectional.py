"""A causal language model with its causal mask lifted: every place may look at every other, and predicts itself.

Owns the attention masks such a model is fed, and how its checkpoint is written and read. Any Llama,
Qwen2, Qwen3, Mistral or Gemma3 of transformers will do; a saved checkpoint is an ordinary Hugging Face directory with a
`dllm.json` beside it.

Shape suffixes: B batch, S sequence, Q query columns, K key columns, D hidden, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from dllm.config.params import Target
from dllm.errors import DataError, ModelError
from dllm.models import targets
from dllm.models.diffusion import families, own_code_files
from dllm.models.mask_token import settle_mask_token
from dllm.prompts.template import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dllm.models.diffusion.cache import CanvasCache
    from dllm.models.diffusion.lora import Adapter

T = TypeVar("T")

NOTE = "dllm.json"
"""File beside config.json that says how a checkpoint is to be decoded."""

Context = Literal["full", "block", "causal"]
"""`full`: every place sees every other; `block`: a block sees itself and what is before; `causal`: the same, but
finished text sees only what is before each place."""


@dataclass(frozen=True)
class DiffusionConfig:
    """What `dllm.json` says of a checkpoint."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    mode: Literal["mdlm", "hybrid"]
    mask_token_id: Annotated[int, Field(strict=True, ge=0)]
    block_size: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Columns of a block where none sees a later one (attention `block`); null where all is seen."""

    @property
    def learned_causally(self) -> bool:
        """Tell whether the model was trained to predict the next token as well."""
        return self.mode == "hybrid"

    @property
    def context(self) -> Context:
        """Tell how text before a block was seen in training."""
        if self.block_size is None:
            return "full"
        return "causal" if self.mode == "hybrid" else "block"


class BidirectionalLM(nn.Module):
    """A language model whose place i predicts token i from all valid places, its own included.

    The family of any causal model of transformers, and the base of the published families (`DIFFUSION_LMS`).
    """

    published: ClassVar[DiffusionConfig | None] = None
    """How a published family was trained, where neither a checkpoint nor its config says otherwise."""
    runs_own_code: ClassVar[bool] = False
    """Whether it runs by the code in its directory."""
    can_run_without_code: ClassVar[bool] = True
    """Whether transformers can run it without that code."""
    sets_own_masks: ClassVar[bool] = False
    """Whether its code sets its attention masks and lays out noisy beside clean text, so that it trains by `paired`."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_token_id: int) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.mask_token_id = mask_token_id
        self.config = model.config.get_text_config()
        self.eos_ids = _eos_ids(model, tokenizer)
        self.prompt_blocks = False
        """Whether a prompt's own blocks are block-causal too, as LLaDA2's are; else a prompt is seen as one block."""
        self.note = DiffusionConfig("mdlm", mask_token_id)
        """How it was, or is being, trained; `save` writes it. A trainer sets it."""
        self.adapter: Adapter | None = None
        """What alone is trained, where the weights themselves stay as they are."""
        self.code: Path | None = None
        """Where the model's own code lies; `save` copies it."""
        self.set_for_training: dict[str, Any] = {}
        """Entries of the config that were changed so that its code can train; `save` restores them."""
        if self.published is not None:
            self.note = replace(self.published, mask_token_id=mask_token_id)
            self.prompt_blocks = self.published.block_size is not None
        # transformers then builds no causal mask of its own; masks given in full are taken as they are.
        self.config.is_causal = False

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Tell from the content of config.json whether a checkpoint is of this family.

        False here: this family is what remains when no other one recognises a checkpoint.
        """
        return False

    @classmethod
    def mask_token_id_in(cls, config: Mapping[str, Any]) -> int | None:
        """Return the mask token id that a checkpoint's config names, else the family's."""
        default = None if cls.published is None else cls.published.mask_token_id
        return config.get("mask_token_id") or default

    @classmethod
    def training_config(cls, directory: Path, block_size: int) -> dict[str, Any]:
        """Return the config entries to change so that its code computes training losses and likelihoods."""
        return {}

    @classmethod
    def training_conflict(cls, *, predicts_next: bool, by_block: bool) -> str | None:
        """Return why it cannot be trained that way; None where it can.

        Args:
            predicts_next: mode hybrid.
            by_block: attention block.
        """
        return None

    @property
    def block_origin(self) -> Literal["answer", "sequence"]:
        """Return where its blocks are counted from: the response's first token or the row's."""
        return "answer" if self.note.mode == "hybrid" else "sequence"

    @property
    def caches(self) -> frozenset[str]:
        """Return the caches that it supports."""
        return frozenset({"none", "prefix", "dual"} if self.note.context == "full" else {"none", "block"})

    @property
    def max_length(self) -> int:
        """Return how many tokens a text may have."""
        return self.longest

    @property
    def longest(self) -> int:
        """Return how many tokens a text may have."""
        for name in ("max_position_embeddings", "max_sequence_length"):
            if (found := getattr(self.config, name, None)) is not None:
                return int(found)
        return 1 << 30

    @property
    def head_VD(self) -> Tensor:
        """Return the output embedding."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def forward(self, work: Callable[[], T]) -> T:
        """Run something that uses this model: where its weights are split over ranks, they are whole only in here."""
        return work()

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every token at every place; place i is about token i.

        Shapes: hidden (..., D); returns (..., V).
        """
        found = nn.functional.linear(hidden, self.head_VD.to(hidden.dtype))
        cap = getattr(self.config, "final_logit_softcapping", None)
        return found if cap is None else torch.tanh(found / cap) * cap

    def hidden(
        self,
        ids_BS: Tensor,
        valid_BS: Tensor | None = None,
        *,
        allowed_BSS: Tensor | None = None,
        position_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """Return what the last layer makes of each place, with full attention over valid places.

        Shapes: ids_BS int64; valid_BS bool, false on padding on either side (its default: all true); allowed_BSS bool,
            true where a row's place may look at a column, instead of everywhere; position_ids_BS int64, by default
            counted over valid places. Returns hidden_BSD.
        """
        if position_ids_BS is None:
            position_ids_BS = places(ids_BS, valid_BS)
        return self._run(ids_BS, position_ids_BS, visible(ids_BS, valid_BS, allowed_BSS), causal=False)

    def causal_hidden(self, ids_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        """Return the last layer with the causal mask in place: place i is then about token i + 1.

        Shapes: as in `hidden`.
        """
        visible_BSS = None
        if valid_BS is not None and not bool(valid_BS.all()):
            length = ids_BS.shape[1]
            before_SS = torch.ones(length, length, dtype=torch.bool, device=ids_BS.device).tril()
            visible_BSS = visible(ids_BS, valid_BS, before_SS.expand(len(ids_BS), -1, -1))
        return self._run(ids_BS, places(ids_BS, valid_BS), visible_BSS, causal=True)

    def paired(self, ids_BS: Tensor, valid_BS: Tensor, masked_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Run code that lays out noisy blocks beside the clean text itself, on blocks counted from the first column.

        What follows a row's end is shown as masks up to the end of its block: so it is when an answer is written, and
        who shares its batch changes nothing.

        Shapes: valid_BS bool, false on padding on the right; returns hidden_BSD of the noisy half, and of the clean
            one, which sees only what is before each place.
        """
        raise ModelError("this model has no layout of its own", where=self.config.model_type)

    def part(self, ids_BQ: Tensor, position_ids_BQ: Tensor, visible_BQK: Tensor, cache: CanvasCache) -> Tensor:
        """Run some columns against the keys and values that a cache holds of others; the cache takes in the new ones.

        Shapes: visible_BQK bool over the cache's K columns, as `CanvasCache.write` left them. Returns hidden_BQD.
        """
        return self._run(ids_BQ, position_ids_BQ, visible_BQK, causal=False, cache=cache)

    def _run(
        self,
        ids_BQ: Tensor,
        position_ids_BQ: Tensor,
        visible_BQK: Tensor | None,
        *,
        causal: bool,
        cache: CanvasCache | None = None,
    ) -> Tensor:
        key_position_BK = position_ids_BQ if cache is None else cache.position_ids_BK
        mask = self._masks(visible_BQK, position_ids_BQ, key_position_BK, causal)
        found = self.model.base_model(
            input_ids=ids_BQ,
            attention_mask=mask,
            position_ids=position_ids_BQ,
            past_key_values=cache,
            use_cache=cache is not None,
            is_causal=causal,
        )
        hidden_BQD: Tensor = found.last_hidden_state
        return hidden_BQD

    def _masks(
        self, visible_BQK: Tensor | None, position_ids_BQ: Tensor, position_ids_BK: Tensor, causal: bool
    ) -> Tensor | dict[str, Tensor | None] | None:
        """Put masks as transformers wants them: one, or one a kind of layer. None sees everything (or before)."""
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        full = None if visible_BQK is None else visible_BQK[:, None]
        near = full
        if window is not None and position_ids_BK.shape[1] > window:
            # Both ways: a window of W reaches W - 1 places back, and as many ahead where looking ahead is allowed.
            apart_BQK = position_ids_BQ[:, :, None] - position_ids_BK[:, None]
            near_BQK = apart_BQK.abs() < window
            if causal and visible_BQK is None:
                near_BQK &= apart_BQK >= 0
            near = (near_BQK if visible_BQK is None else near_BQK & visible_BQK)[:, None]
        if kinds is not None:
            return {"full_attention": full, "sliding_attention": near}
        return full if window is None else near

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write a Hugging Face directory that transformers loads, with the tokenizer and, from `note`, `dllm.json`.

        A model with code of its own takes it along.

        Args:
            weights: whole ones under this module's names, where its own are split over ranks.
        """
        if weights is not None:
            weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        del self.config.is_causal
        try:
            self.model.save_pretrained(directory, state_dict=weights)
        finally:
            self.config.is_causal = False
        self.tokenizer.save_pretrained(directory)
        if self.code is not None:
            own_code_files.copy_code(self.code, Path(directory), self.set_for_training)
        (Path(directory) / NOTE).write_text(json.dumps(asdict(self.note), indent=2) + "\n")

    @classmethod
    def from_directory(
        cls,
        directory: Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        *,
        trust_remote_code: bool = False,
        paired: bool = False,
    ) -> BidirectionalLM:
        """Read what `save` wrote; `note` then holds its `dllm.json`.

        Args:
            trust_remote_code: run the code that lies in the directory.
            paired: as in `load_bidirectional`, with the note's blocks.

        Raises:
            ModelError: there is no such directory, it lacks tensors, or its `dllm.json` is missing or broken.
        """
        target = Target(model=str(directory), dtype="float32", trust_remote_code=trust_remote_code)
        note = read_note(Path(directory)) if paired else None
        return load_bidirectional(target, dtype or "float32", device, paired=None if note is None else note.block_size)


def load_bidirectional(
    target: Target,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    mask_token_id: int | None = None,
    paired: int | None = None,
) -> BidirectionalLM:
    """Load a causal model frozen and in evaluation mode, with its mask lifted and a mask token settled.

    Args:
        target: which model; a checkpoint's directory brings its own mask token.
        dtype: by default the target's.
        device: where to.
        mask_token_id: the mask's row, where neither the checkpoint nor the tokenizer has one; null adds a token.
        paired: tokens a block, to set up code that lays out noisy and clean text itself for training and likelihood
            instead of generation; other models are as they are.

    Raises:
        ModelError: the model cannot be read.
        ConfigError: the mask token is no row of the embedding, text uses it, or a published model has another one.
    """
    path = targets.locate(target)
    note, found_there = read_note(path), families.family_at(path)
    family = families.family_to_run(path, target.trust_remote_code)
    values = {} if paired is None else family.training_config(path, paired)
    tokenizer = targets.load_tokenizer(target)
    model = targets.load_target(target, dtype, device, values)
    wanted = note.mask_token_id if note is not None else mask_token_id
    if wanted is None and family is not found_there:
        wanted = found_there.mask_token_id_in(families.config_at(path))  # LLaDA, read as a Llama
    trained_id = None
    if family.published is not None:
        trained_id = getattr(model.config, "mask_token_id", None) or family.published.mask_token_id
    mask_id = settle_mask_token(model, tokenizer, wanted, _eos_ids(model, tokenizer), trained_id)
    found: BidirectionalLM = family(model, tokenizer, mask_id)
    found.note = note or found.note
    if paired is not None and found.sets_own_masks:
        found.note = replace(found.note, block_size=paired)
    if found.runs_own_code:
        found.code, found.set_for_training = path, values
    return found


def read_note(directory: Path) -> DiffusionConfig | None:
    """Read a checkpoint's `dllm.json`; None where it has none.

    Raises:
        ModelError: it does not say what it should.
    """
    path = directory / NOTE
    if not path.is_file():
        return None
    try:
        return TypeAdapter(DiffusionConfig).validate_python(json.loads(path.read_text()))
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    except ValueError as error:
        wrong = str(error)
    raise ModelError(f"cannot read the checkpoint's note: {wrong}", where=str(path))


def places(ids_BS: Tensor, valid_BS: Tensor | None) -> Tensor:
    """Number each row's valid places from 0. Shapes: returns position_ids_BS int64."""
    if valid_BS is None:
        return torch.arange(ids_BS.shape[1], device=ids_BS.device).expand(ids_BS.shape)
    return (valid_BS.long().cumsum(1) - 1).clamp_min(0)


def visible(ids_BS: Tensor, valid_BS: Tensor | None, allowed_BSS: Tensor | None) -> Tensor | None:
    """Join both masks; None where everything is seen. Padding sees itself alone, for a softmax over nothing is NaN."""
    if valid_BS is None or bool(valid_BS.all()):
        return allowed_BSS
    seen_BSS = valid_BS[:, None].expand(-1, ids_BS.shape[1], -1)
    if allowed_BSS is not None:
        seen_BSS = seen_BSS & allowed_BSS
    return seen_BSS | torch.eye(ids_BS.shape[1], dtype=torch.bool, device=ids_BS.device)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Collect the ids that end an answer; a model without a chat template still has those of its configs."""
    found: set[int] = set()
    try:
        found = stop_ids(tokenizer, getattr(model, "generation_config", None))
    except DataError:
        if tokenizer.eos_token_id is not None:
            found.add(int(tokenizer.eos_token_id))
    ids: Any = model.config.get_text_config().eos_token_id
    return found | ({ids} if isinstance(ids, int) else set(ids or ()))
