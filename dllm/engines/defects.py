"""What no response may hold, whichever engine it comes from: what a shard cannot store, or a chat template not render.

Engines hand on what servers say, and journals what earlier calls were told. A response with a defect is rejected, and
generated again by the next call.
"""

from __future__ import annotations

import math
from typing import Any

from dllm.engines.engine import Request, Response
from dllm.outside import MAX_DEPTH, JsonError, is_text, parse_json

MAX_ID = 2**31 - 1
ENDINGS = ("stop", "length", "tool_calls")
LEAST_TOKENS, MOST_TIMES = 32, 4
"""A response may have so many more ids than were asked for: the text of a broken character has three, and a tokenizer
may split a text otherwise than the server generated it."""


def defect(response: Response, request: Request | None = None) -> str | None:
    """Return what is wrong with a response, in one line; None where nothing is.

    Args:
        request: what it responds to; None leaves out whether it is longer than asked for.
    """
    try:
        _check_fields(response)
        _check(response.text, "the text")
        for call in response.tool_calls:
            _check_call(call)
    except ValueError as error:
        return f"the response is unusable: {error}"
    if request and len(response.token_ids) > LEAST_TOKENS + MOST_TIMES * request.max_new_tokens:
        asked = f"{request.max_new_tokens} were asked for"
        return f"the response is unusable: it has {len(response.token_ids)} tokens, and at most {asked}"
    return None


def _check_fields(response: Response) -> None:
    if not (isinstance(response.key, str) and isinstance(response.text, str)):
        raise ValueError("its text is not a string")
    if not all(type(id) is int and 0 <= id <= MAX_ID for id in response.token_ids):
        raise ValueError("its ids are not token ids")
    if response.finish_reason not in ENDINGS:
        raise ValueError(f"its finish_reason is none of {', '.join(ENDINGS)}")


def _check_call(call: Any) -> None:
    try:
        texts = [call["id"], call["function"]["name"], call["function"]["arguments"]]
    except (TypeError, KeyError):
        raise ValueError("a call lacks its name, id or arguments") from None
    if not all(isinstance(text, str) for text in texts) or not texts[1]:
        raise ValueError("the name, id or arguments of a call are not strings")
    _check(call, "a call")
    try:
        arguments = parse_json(texts[2])
    except JsonError as error:
        if texts[2].count("[") + texts[2].count("{") > MAX_DEPTH:
            raise ValueError("the arguments of a call are nested too deeply") from error
        return  # not JSON: chat templates render it as a string
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a call are not a JSON object")
    _check(arguments, "the arguments of a call")


def _check(value: Any, name: str) -> None:
    """Check the strings and numbers of a JSON value, whose depth is bounded."""
    if isinstance(value, str) and not is_text(value):
        raise ValueError(f"{name} contains an unpaired surrogate, which cannot be encoded")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} contains a number that is not finite")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for inner in value:
            _check(inner, name)
