"""What a family of diffusion LMs provides: hidden states of noisy and clean text, blocks, caches, its files.

A family is one class in one file and one line of `dllm.registry.DIFFUSION_LMS`. Training, likelihoods, samplers and
lm-eval use this protocol and nothing else, and ask no model which family it is.

The hidden state at position i is the one that predicts token i, the position's own. A family whose network predicts
token i + 1 at position i shifts its hidden states by one column.

Shape suffixes: B batch, S sequence, Q query columns, K key columns, C columns of a pass, D hidden, V vocabulary,
M masked positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllm.errors import DataError, ModelError
from dllm.models.diffusion.cache import CanvasCache
from dllm.models.diffusion.config import Context, DiffusionConfig, Origin
from dllm.models.diffusion.layout import blocks_of, paired_layout
from dllm.models.diffusion.lora import Adapter
from dllm.models.positions import UNBOUNDED, positions_in
from dllm.prompts.template import stop_ids

T = TypeVar("T")


class Columns(Protocol):
    """One row of text that is run a few columns at a time, with the keys and values of the columns before."""

    def run(self, ids_BC: Tensor, begin: int, causal: bool) -> Tensor:
        """Run the columns from `begin` on; what was kept of later columns is dropped.

        Args:
            causal: with a causal mask, and their keys and values are kept; otherwise they attend to each other, and
                nothing is kept.

        Shapes: ids_BC int64 with B = 1; returns hidden_BCD.
        """


class DiffusionLM(nn.Module, ABC):
    """A masked diffusion LM around a model of transformers.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        mask_token_id: from `dllm.models.mask_token.settle_mask_token`.
    """

    published: ClassVar[DiffusionConfig | None] = None
    """How a published family was trained, where a checkpoint has no `dllm.json`. With it every
    checkpoint of the family is a diffusion LM; without it one that has a `dllm.json`."""
    config_keys: ClassVar[frozenset[str] | None] = frozenset()
    """Keys of config.json that it reads besides those that transformers reads for the model type; others are refused.
    None: it reads config.json without transformers, and checks it itself, in `check_config`."""
    runs_own_code: ClassVar[bool] = False
    """Whether it runs the code in its directory; without trust the checkpoint is then read as `transformers`."""
    can_run_without_code: ClassVar[bool] = True
    """Whether transformers can run it without that code."""
    sets_own_masks: ClassVar[bool] = False
    """Whether its code sets its attention masks, so that samplers that need others cannot decode it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_token_id: int) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.mask_token_id = mask_token_id
        self.model_config = model.config.get_text_config()
        # transformers then builds no causal mask of its own; masks given in full are taken as they are.
        self.model_config.is_causal = False
        self.eos_ids = eos_ids_of(model, tokenizer)
        self.prompt_blocks = self.published is not None and self.published.block_size is not None
        """Whether the blocks of a prompt are block-causal too, as LLaDA2's are; else a prompt is one block."""
        self.config = replace(self.published or DiffusionConfig("mdlm", 0), mask_token_id=mask_token_id)
        """How it was, or is being, trained; `save` writes it. A trainer sets it."""
        self.adapter: Adapter | None = None
        """What is trained where the weights are frozen."""

    # Before the weights are read, from config.json.

    @classmethod
    @abstractmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a checkpoint is of this family, by the content of its config.json."""

    @classmethod
    def check_config(cls, config: Mapping[str, Any], where: str) -> None:
        """Check a config.json that is read without transformers.

        Raises:
            ModelError: it has a key that is not known, or a value that is not supported; it names `where`, the file.
        """
        raise NotImplementedError

    @classmethod
    def mask_token_id_in(cls, config: Mapping[str, Any]) -> int | None:
        """Return the mask token id that config.json names, else the family's."""
        default = None if cls.published is None else cls.published.mask_token_id
        return config.get("mask_token_id") or default

    @classmethod
    def training_conflict(cls, *, predicts_next: bool, by_block: bool, recomputes: bool) -> str | None:
        """Return why it cannot be trained that way; None where it can.

        Args:
            predicts_next: next-token prediction too, under a causal mask.
            by_block: with attention `block`.
            recomputes: with layers recomputed in the backward pass, and whole weights.
        """
        return None

    # How it is decoded.

    @property
    def default_sampler(self) -> str:
        """Name the member of SAMPLERS that shows the model its text as training did."""
        return "nemotron" if self.config.context == "causal" else "llada"

    @property
    def caches(self) -> frozenset[str]:
        """Return the caches that it supports, as `dllm.decoding.settings.CacheKind` names them."""
        return frozenset({"none", "prefix", "dual"} if self.config.context == "full" else {"none", "block"})

    @property
    def block_origin(self) -> Origin:
        """Return where its blocks are counted from."""
        return self.config.block_origin

    @property
    def max_length(self) -> int:
        """Return the most tokens of a text."""
        return positions_in(self.model_config.to_dict()) or UNBOUNDED

    # Passes.

    @property
    def head_VD(self) -> Tensor:
        """Return the output embedding."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def forward(self, work: Callable[[], T]) -> T:
        """Run something that uses the model: sharded weights are whole only in here."""
        return work()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states. Shapes: hidden (..., D); returns (..., V)."""
        return softcapped(nn.functional.linear(hidden, self.head_VD.to(hidden.dtype)), self.model_config)

    @abstractmethod
    def hidden(
        self,
        ids_BS: Tensor,
        valid_BS: Tensor | None = None,
        *,
        allowed_BSS: Tensor | None = None,
        position_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """Return the last hidden states, by default with attention to every valid column.

        Shapes: ids_BS int64; valid_BS bool, false on padding on either side (default: all true); allowed_BSS bool, true
            where a row's column may attend to another, instead of everywhere; position_ids_BS int64, by default counted
            over valid columns. Returns hidden_BSD.
        """

    @abstractmethod
    def causal_hidden(self, ids_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        """Return the last hidden states under a causal mask; position i then predicts token i + 1.

        Shapes: as in `hidden`.
        """

    def masked_hidden(
        self,
        ids_BS: Tensor,
        valid_BS: Tensor,
        block_BS: Tensor,
        masked_BS: Tensor,
        context: Context | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mask some positions of clean text; return their hidden states, as training and likelihoods need them.

        Args:
            context: by default the model's own. With `causal` the hidden states of the clean text, as of
                `causal_hidden`, are returned too.

        Shapes: valid_BS bool, false on padding on the right; block_BS from `blocks`; masked_BS bool. Returns hidden_MD
            and clean_BSD or None.
        """
        context = context or self.config.context
        noisy_BS = ids_BS.masked_fill(masked_BS, self.mask_token_id)
        if context == "full":
            return self.hidden(noisy_BS, valid_BS)[masked_BS], None
        pair = paired_layout(noisy_BS, ids_BS, valid_BS, block_BS, context)
        hidden_BXD = self.hidden(pair.ids_BX, allowed_BSS=pair.allowed_BXX, position_ids_BS=pair.position_ids_BX)
        masked_MD = hidden_BXD[:, : pair.noisy][masked_BS[:, pair.begin :]]
        return masked_MD, hidden_BXD[:, pair.noisy :] if context == "causal" else None

    def blocks(self, length: int, prompt_length: int, block_size: int | None) -> Tensor:
        """Number the blocks of a row as the model counts them. Shapes: returns block_S int64, as of `blocks_of`."""
        return blocks_of(length, prompt_length, block_size, self.block_origin, self.prompt_blocks)

    def cached_hidden(self, ids_BQ: Tensor, position_ids_BQ: Tensor, visible_BQK: Tensor, cache: CanvasCache) -> Tensor:
        """Run some columns over the keys and values in a cache, which takes in theirs.

        Only for a family with a cache in `caches`.

        Shapes: visible_BQK bool over the cache's K columns, as `CanvasCache.next_pass` left them. Returns hidden_BQD.
        """
        raise NotImplementedError

    def columns(self, number: int) -> Columns:
        """Make room for a row of so many columns, for samplers that attend causally to what precedes a block.

        Raises:
            ModelError: the model cannot be run so.
        """
        raise ModelError("this model cannot be run a few columns at a time", where=self.model_config.model_type)

    def for_likelihood(self, block_size: int | None = None) -> DiffusionLM:
        """Return the model in the form that trains and scores given text: itself, or one that shares its weights.

        Args:
            block_size: tokens per block, by default those of `config`; for code that is built for one block size.
        """
        return self

    # Files.

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write a Hugging Face directory with the tokenizer and, from `config`, `dllm.json`.

        Args:
            weights: whole ones under this module's names, where its own are sharded over ranks.
        """
        if weights is not None:
            weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        del self.model_config.is_causal
        try:
            self.model.save_pretrained(directory, state_dict=weights)
        finally:
            self.model_config.is_causal = False
        self.tokenizer.save_pretrained(directory)
        self.config.save(Path(directory))


def softcapped(logits: Tensor, config: Any) -> Tensor:
    """Cap logits as a model's config says. Source: Gemma 2 (2024), section 2."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def eos_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Collect the ids that end a response; a model without a chat template still has those of its configs."""
    found: set[int] = set()
    try:
        found = stop_ids(tokenizer, getattr(model, "generation_config", None))
    except DataError:
        if tokenizer.eos_token_id is not None:
            found.add(int(tokenizer.eos_token_id))
    ids: Any = model.config.get_text_config().eos_token_id
    return found | ({ids} if isinstance(ids, int) else set(ids or ()))
