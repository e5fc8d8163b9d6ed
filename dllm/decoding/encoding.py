"""Encode prompts: a chat, text to continue, or text with spans to fill."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from dllm.errors import DataError
from dllm.prompts.template import prompt_ids, render

SPAN = re.compile(r"\[MASK(?::([1-9]\d*))?\]")


def checked(text: str, number: int) -> str:
    """Return a text that a tokenizer accepts.

    Raises:
        DataError: it is empty, or holds surrogates, as bytes that are not UTF-8 become on a command line.
    """
    if not text.strip():
        raise DataError("empty prompt", where=f"prompt {number}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("not UTF-8", where=f"prompt {number}") from None
    return text


def check_room(length: int, new_tokens: int, max_length: int, number: int) -> None:
    """Refuse a prompt that leaves no room for its response.

    Args:
        number: which prompt it is, for messages.

    Raises:
        DataError: it does.
    """
    if length + new_tokens > max_length:
        raise DataError(
            f"{length} tokens and {new_tokens} new ones are more than this model's {max_length}",
            where=f"prompt {number}",
            hint="shorten it, or lower --max-new-tokens" if new_tokens else "shorten it",
        )


def text_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, raw: bool, enable_thinking: bool | None, number: int
) -> list[int]:
    """Encode a prompt as a chat, or with `raw` as it is.

    Args:
        number: which prompt it is, for messages.

    Raises:
        DataError: it is empty, or the tokenizer has no chat template.
    """
    checked(text, number)
    if raw:
        ids = list(tokenizer(text)["input_ids"])
    else:
        _check_template(tokenizer)
        ids = prompt_ids(tokenizer, [{"role": "user", "content": text}], enable_thinking)
    if not ids:
        raise DataError("empty prompt", where=f"prompt {number}")
    return ids


def span_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, raw: bool, mask_token_id: int, max_length: int, number: int
) -> list[int]:
    """Encode text whose [MASK] stands for one token and [MASK:n] for n; unless `raw`, as a user turn.

    Args:
        max_length: most tokens of a text.
        number: as in `text_ids`.

    Raises:
        DataError: there is no span, or a malformed one.
    """
    where = f"prompt {number}"
    checked(text, number)
    spans = list(SPAN.finditer(text))
    odd = re.findall(r"\[MASK[^\]\s]*\]?", SPAN.sub("", text))
    if odd or not spans:
        message = f"{odd[0]} is no span" if odd else "nothing to fill in"
        raise DataError(message, where=where, hint="write [MASK] for one token, or [MASK:n] for n of them")
    lengths = [int(span[1] or 1) for span in spans]
    if sum(lengths) > max_length:
        raise DataError(
            f"spans of {sum(lengths)} tokens, and a text of this model has {max_length} at most", where=where
        )
    rendered, ids = text, list[int]()
    if raw:
        opening = tokenizer("")["input_ids"]
        ids += opening[: int(opening[:1] == [tokenizer.bos_token_id])]  # an empty text may also be closed
    else:
        _check_template(tokenizer)
        chat = [{"role": "user", "content": text}]
        rendered = render(tokenizer, chat, add_generation_prompt=False)
    # Split at spans: text, number, text, number, ..., text.
    for index, part in enumerate(SPAN.split(rendered)):
        if index % 2:
            ids += [mask_token_id] * int(part or 1)
        else:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    if ids.count(mask_token_id) != sum(lengths):
        raise DataError("the text holds the mask token itself", where=where, hint="write [MASK] instead")
    return ids


def fill_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int], filled_ids: Sequence[int], mask_token_id: int
) -> str:
    """Replace each span by its decoded tokens; all other text is unchanged.

    Args:
        ids: from `span_ids`.
        filled_ids: the same with masks replaced.
    """
    new = iter([token for given, token in zip(ids, filled_ids, strict=True) if given == mask_token_id])
    return SPAN.sub(
        lambda span: str(tokenizer.decode(list(islice(new, int(span[1] or 1))), skip_special_tokens=True)), text
    )


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError("the model's tokenizer has no chat template", hint="give --raw to take the text as it is")
