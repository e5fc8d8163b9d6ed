"""The token id that stands for a masked position.

Owns the choice of a row of the embedding that no text uses, the checks on an id given by hand, and the growth of a
model that has no row to spare.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dllm.errors import ConfigError, ModelError
from dllm.models.quiet import without_warnings
from dllm.prompts.template import framing_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MASK = "<|mask|>"


@dataclass(frozen=True)
class MaskPolicy:
    """Which ids may become the mask, and how errors name the model and the setting."""

    owner: str
    where: str
    may_take_unused: bool
    """Fall back on reserved tokens, rows past the tokenizer and unused special tokens, and skip ids that text uses.
    Without it a model's only mask token is used or refused."""
    hint: str | None = None


DRAFT_MASK = MaskPolicy(
    "target", "train.dflash.mask_token_id", True, "choose an unused id, or null to resolve it from the tokenizer"
)
"""A draft's: any row of the frozen target's embedding that text leaves unused."""
DIFFUSION_MASK = MaskPolicy("model", "mask_token_id", False)
"""A diffusion model's own: a mask token, which is trained with the model."""


def find_mask_id(
    policy: MaskPolicy,
    tokenizer: PreTrainedTokenizerBase,
    explicit: int | None,
    vocab_rows: int,
    stop_ids: Collection[int] = (),
) -> int | None:
    """Return the mask id: `explicit` if given, else the first that the policy allows; None if there is none.

    In this order: the tokenizer's mask token; a special token called mask; where the policy may take unused ones, a
    special token called reserved or unused, the first embedding row past the tokenizer (the choice of published Qwen3
    drafts), the last special token that neither the chat template nor any role (begin, end, pad, unknown) uses.

    Args:
        policy: whose mask it is.
        tokenizer: the model's.
        explicit: an id set by hand or by a checkpoint.
        vocab_rows: rows of the model's embedding.
        stop_ids: ids that end a response, beyond the tokenizer's own.

    Raises:
        ConfigError: the id is no row of the embedding, or text uses it.
    """
    used = framing_ids(tokenizer) | set(stop_ids)
    if explicit is None:
        candidates = _candidates(tokenizer, policy.may_take_unused)
        if policy.may_take_unused:
            return next((id for id in candidates if 0 <= id < vocab_rows and id not in used), None)
        explicit = next(candidates, None)
    if explicit is None:
        return None
    if not 0 <= explicit < vocab_rows:
        raise ConfigError(
            f"mask id {explicit} is outside the {policy.owner}'s embedding of {vocab_rows} rows",
            where=policy.where,
            hint=policy.hint,
        )
    if explicit in used:
        token = tokenizer.convert_ids_to_tokens(explicit)
        raise ConfigError(
            f"mask id {explicit} is {token}, which ends or frames the {policy.owner}'s text",
            where=policy.where,
            hint=policy.hint,
        )
    return explicit


def draft_mask_id(
    explicit: int | None, tokenizer: PreTrainedTokenizerBase, vocab_rows: int, stop_ids: Collection[int] = ()
) -> int:
    """Return the id that a draft reads at masked slots.

    Raises:
        ConfigError: the given id is no row of the embedding, or text uses it.
        ModelError: the tokenizer leaves no id unused.
    """
    found = find_mask_id(DRAFT_MASK, tokenizer, explicit, vocab_rows, stop_ids)
    if found is None:
        raise ModelError(
            "the tokenizer leaves no special token unused and the embedding has no row past it",
            where=DRAFT_MASK.where,
            hint="choose an id that the target's text never holds",
        )
    return found


def settle_mask_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    explicit: int | None,
    eos_ids: Collection[int] = (),
    trained_id: int | None = None,
) -> int:
    """Return a diffusion model's mask id, and add it to the tokenizer and the embedding if they lack it.

    A published diffusion model has been trained with one (`trained_id`), and no other will do. Else `find_mask_id`;
    failing that, `<|mask|>` is added to the tokenizer, and one row to the embedding (and head) if none is unused.

    Raises:
        ConfigError: the id is no row of the embedding, text uses it, or the model was trained with another one.
    """
    embedding: Any = model.get_input_embeddings()
    rows = len(embedding.weight)
    if trained_id is not None:
        given = tokenizer.mask_token_id if explicit is None else explicit
        if given not in (None, trained_id):
            raise ConfigError(
                f"mask id {given}, and {model.config.model_type} was trained with {trained_id}",
                where=DIFFUSION_MASK.where,
            )
        if tokenizer.convert_ids_to_tokens(trained_id) is None:
            raise ConfigError(f"mask id {trained_id} is no token of the model's tokenizer", where=DIFFUSION_MASK.where)
        explicit = int(trained_id)
    found = find_mask_id(DIFFUSION_MASK, tokenizer, explicit, rows, eos_ids)
    if found is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
        added: Any = tokenizer.convert_tokens_to_ids(MASK)
        found = int(added)
        if found >= rows:
            with without_warnings():
                model.resize_token_embeddings(found + 1, mean_resizing=True)
    elif tokenizer.mask_token_id is None and (token := tokenizer.convert_ids_to_tokens(found)) is not None:
        tokenizer.add_special_tokens({"mask_token": token})
    return found


def _candidates(tokenizer: PreTrainedTokenizerBase, may_take_unused: bool) -> Iterator[int]:
    """List ids in the order in which they are considered."""
    added = tokenizer.added_tokens_decoder
    special = [(added[id].content, int(id)) for id in sorted(added) if added[id].special]
    if tokenizer.mask_token_id is not None:
        yield int(tokenizer.mask_token_id)
    yield from (id for token, id in special if re.search("mask", token, re.IGNORECASE))
    if may_take_unused:
        yield from (id for token, id in special if re.search("reserved|unused|extra_id", token, re.IGNORECASE))
        yield len(tokenizer)
        yield from (id for _, id in reversed(special))
