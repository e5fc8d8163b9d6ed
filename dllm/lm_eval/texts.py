"""Texts as lm-evaluation-harness hands them over, as ids, and written ids as the texts it expects back.

Owns where a context ends and what is scored begins, how long texts are cut into windows, and where answers stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[list[int], list[int]]
"""What is given and what is scored, as ids; what is given is never empty."""


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a text's ids; no special token is added, those spelled out in it are recognised."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, prefix: int) -> Pair:
    """Return the ids of a context and of what follows it.

    White space at the context's end goes with the continuation, since tokens begin with it. An empty context is one
    `prefix` token. Both texts are encoded as one; only where a token would bridge them, each by itself.
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


def windows(ids: Sequence[int], prefix: int, longest: int) -> list[Pair]:
    """Cut a long text so that each token is scored once, in windows of at most `longest` ids.

    A window begins with one given token, the first one with `prefix`; the last window has as much context as fits.
    """
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    pairs = get_rolling_token_windows(list(ids), prefix, max_seq_len=longest - 1, context_len=1)
    return [make_disjoint_window(pair) for pair in pairs]


def cut(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], until: Sequence[str]) -> str:
    """Decode an answer up to where the first of all stop strings begins, whichever that is, without special tokens."""
    # Stop strings may be special tokens, so these leave only afterwards.
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
    ends = [text.find(stop) for stop in until if stop and stop in text]
    text = text[: min(ends, default=len(text))]
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, "")
    return text
