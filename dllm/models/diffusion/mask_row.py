"""The row of the embedding that stands for "not written yet" in a diffusion model.

Owns the choice of that token, and the growth of a model that has no row to spare.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from dllm.errors import ConfigError
from dllm.models.diffusion.remote import KINDS
from dllm.models.quiet import without_warnings
from dllm.prompts.template import framing_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MASK = "<|mask|>"


def settle_mask_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, explicit: int | None, eos_ids: Collection[int] = ()
) -> int:
    """Return the mask id, and make the tokenizer and the embedding have it.

    A model of a published family has its own (its config's, else the family's), and no other will do. Else, in this
    order: `explicit`; the tokenizer's mask token; a special token called mask; else `<|mask|>` is added to the
    tokenizer, and one row to the embedding (and head) if none is unused.

    Raises:
        ConfigError: the id is no row of the embedding, text uses it, or a published model has another one.
    """
    embedding: Any = model.get_input_embeddings()
    rows = len(embedding.weight)
    found = _choose(model, tokenizer, explicit)
    if found is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
        added: Any = tokenizer.convert_tokens_to_ids(MASK)
        found = int(added)
        if found >= rows:
            _add_row(model, found + 1)
            rows = found + 1
    elif tokenizer.mask_token_id is None and (token := tokenizer.convert_ids_to_tokens(found)) is not None:
        tokenizer.add_special_tokens({"mask_token": token})
    taken = framing_ids(tokenizer) | set(eos_ids)
    if not 0 <= found < rows:
        raise ConfigError(f"mask id {found} is outside the model's embedding of {rows} rows", where="mask_token_id")
    if found in taken:
        token = tokenizer.convert_ids_to_tokens(found)
        raise ConfigError(f"mask id {found} is {token}, which ends or frames the model's text", where="mask_token_id")
    return found


def _add_row(model: PreTrainedModel, rows: int) -> None:
    """Draw a row like the others, without the remark that transformers makes of it."""
    with without_warnings():
        model.resize_token_embeddings(rows, mean_resizing=True)


def _choose(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, explicit: int | None) -> int | None:
    kind = KINDS.get(model.config.model_type)
    own = None if kind is None else getattr(model.config, "mask_token_id", None) or kind.mask_token_id
    if explicit is None and tokenizer.mask_token_id is not None:
        explicit = int(tokenizer.mask_token_id)
    if own is not None:
        if explicit not in (None, own):
            raise ConfigError(
                f"mask id {explicit}, and {model.config.model_type} was trained with {own}", where="mask_token_id"
            )
        if tokenizer.convert_ids_to_tokens(own) is None:
            raise ConfigError(f"mask id {own} is no token of the model's tokenizer", where="mask_token_id")
        return int(own)
    if explicit is not None:
        return explicit
    added = tokenizer.added_tokens_decoder
    for id in sorted(added):
        if added[id].special and re.search("mask", added[id].content, re.IGNORECASE):
            return int(id)
    return None
