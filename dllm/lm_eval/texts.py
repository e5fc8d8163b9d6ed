"""Encode the harness's texts as ids, and decode generated ids as the text it expects.

Owns where a context ends and scoring begins, how long texts are cut into windows, and where responses stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[list[int], list[int]]
"""Context ids, never empty, and the ids to score."""


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a text's ids; no special token is added, those in the text are recognised."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, prefix: int) -> Pair:
    """Return the ids of a context and of its continuation.

    White space at the context's end moves to the continuation, since tokens begin with it. An empty context is one
    `prefix` token. Both texts are encoded together, or separately where a token would span both.
    """
    given_text = context.rstrip()
    scored_text = context[len(given_text) :] + continuation
    if not given_text:
        scored = encode(tokenizer, scored_text)
        return (scored[:1], scored[1:]) if scored[:1] == [prefix] else ([prefix], scored)
    given, whole = encode(tokenizer, given_text), encode(tokenizer, given_text + scored_text)
    if whole[: len(given)] == given:
        return given, whole[len(given) :]
    return given, encode(tokenizer, scored_text)


def windows(ids: Sequence[int], prefix: int, max_length: int) -> list[Pair]:
    """Cut a long text so that each token is scored once, in windows of at most `max_length` ids.

    A window begins with one context token, the first one with `prefix`; the last window has as much context as fits.
    """
    pairs = get_rolling_token_windows(list(ids), prefix, max_seq_len=max_length - 1, context_len=1)
    return [make_disjoint_window(pair) for pair in pairs]


def cut(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], until: Sequence[str]) -> str:
    """Decode a response up to the first occurrence of any stop string, without special tokens."""
    # Stop strings may be special tokens, so these are removed only afterwards.
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
    ends = [text.find(stop) for stop in until if stop and stop in text]
    text = text[: min(ends, default=len(text))]
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, "")
    return text
