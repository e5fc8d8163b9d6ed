"""The id fed at masked slots.

Owns the choice of a row of the target's embedding that no text uses, and the checks on one given by hand.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from dllm.errors import ConfigError, ModelError
from dllm.prompts.template import framing_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "train.dflash.mask_token_id"


def resolve_mask_id(
    explicit: int | None, tokenizer: PreTrainedTokenizerBase, vocab_rows: int, stop_ids: Collection[int] = ()
) -> int:
    """Return the mask id: `explicit` when given, else one that the tokenizer leaves unused.

    Tried in this order: the tokenizer's mask token, a special token called mask, one called reserved or unused, the
    first embedding row past the tokenizer (the choice of published Qwen3 drafts), the last special token that neither
    the chat template nor any role (begin, end, pad, unknown) uses.

    Args:
        explicit: `train.dflash.mask_token_id`.
        tokenizer: the target's.
        vocab_rows: rows of the target's embedding.
        stop_ids: ids that end an answer, beyond the tokenizer's own.

    Raises:
        ConfigError: the given id is no row of the embedding, or text uses it.
        ModelError: the tokenizer leaves no id unused.
    """
    taken = framing_ids(tokenizer) | set(stop_ids)
    if explicit is not None:
        if not 0 <= explicit < vocab_rows:
            raise ConfigError(
                f"mask id {explicit} is outside the target's embedding of {vocab_rows} rows",
                where=KEY,
                hint="name a smaller id, or null to resolve it from the tokenizer",
            )
        if explicit in taken:
            token = tokenizer.convert_ids_to_tokens(explicit)
            raise ConfigError(
                f"mask id {explicit} is {token}, which ends or frames the target's text",
                where=KEY,
                hint="name an unused id, or null to resolve it from the tokenizer",
            )
        return explicit
    for candidate in _candidates(tokenizer):
        if 0 <= candidate < vocab_rows and candidate not in taken:
            return candidate
    raise ModelError(
        "the tokenizer leaves no special token unused and the embedding has no row past it",
        where=KEY,
        hint="name an id that the target's text never holds",
    )


def _special(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int]]:
    """List added special tokens in the order of their ids."""
    added = tokenizer.added_tokens_decoder
    return [(added[i].content, i) for i in sorted(added) if added[i].special]


def _candidates(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    special = _special(tokenizer)
    own = [tokenizer.mask_token_id] if tokenizer.mask_token_id is not None else []
    masks = [i for token, i in special if re.search("mask", token, re.IGNORECASE)]
    reserved = [i for token, i in special if re.search("reserved|unused|extra_id", token, re.IGNORECASE)]
    return [*own, *masks, *reserved, len(tokenizer), *(i for _, i in reversed(special))]
