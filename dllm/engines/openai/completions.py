"""Chat completions: a request as JSON, and a server's reply as token ids.

Servers return text, so the ids of a response are those that the tokenizer gives its text, with the template's end of
turn where the server says `stop`; the target may have generated other ids for the same text. A response that calls
tools has the ids that the chat template renders for it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dllm.config.params import Target
from dllm.engines.engine import Refusal, Request, Response
from dllm.engines.openai.client import Fault
from dllm.engines.openai.servers import Server
from dllm.errors import DataError, ServerError
from dllm.prompts import template as chat

ENDINGS = ("stop", "length", "tool_calls")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """The part of a server's reply that is used."""

    text: str
    finish_reason: str
    tool_calls: tuple[dict[str, Any], ...]
    prompt_tokens: int | None
    """As counted by the server."""
    url: str


class Completions:
    """Encode requests for one model, and decode the replies.

    Args:
        model: the name that servers know it under.
        target: has `enable_thinking`.
        tokenizer: the target's.
    """

    def __init__(self, model: str, target: Target, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._thinking = target.enable_thinking
        self._stop_id = chat.end_of_turn_id(tokenizer)
        self._warned = False

    def body(self, request: Request) -> bytes:
        """Encode a request as the JSON to post."""
        body: dict[str, Any] = {
            "model": self._model,
            "messages": request.messages,
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
        }
        if request.tools:
            body["tools"] = request.tools
        if self._thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self._thinking}
        if self._thinking:
            body["separate_reasoning"] = False  # SGLang's name for leaving the thinking in the text
        return json.dumps(body).encode()

    def read(self, server: Server, reply: Any) -> Reply:
        """Decode a reply's JSON.

        Raises:
            Fault: another model replied, or the reply cannot be used.
            ServerError: the server separates the reasoning.
        """
        try:
            choice = reply["choices"][0]
            message, reason = choice["message"], choice["finish_reason"]
            text, calls = message.get("content") or "", message.get("tool_calls") or []
            tool_calls = tuple(_call(call) for call in calls)
            is_read = isinstance(text, str)
        except (TypeError, KeyError, IndexError, AttributeError):
            is_read = False
        if not is_read:
            raise Fault("the reply is not a chat completion", "outage")
        if (model := reply.get("model")) not in (None, self._model):
            raise Fault(f"the server answered as {str(model)[:200]!r}, not as {self._model!r}", "wrong_model")
        if message.get("reasoning_content") or message.get("reasoning"):
            raise ServerError(
                "the server separates the reasoning from the response",
                where=server.url,
                hint="start it without a reasoning parser, so that the response is complete",
            )
        if reason == "stop" and tool_calls:
            reason = "tool_calls"  # some servers say `stop` where tool_choice names the tool
        if reason not in ENDINGS or (reason == "tool_calls" and not tool_calls):
            raise Fault(
                f"the response ended with finish_reason {reason!r} and {len(tool_calls)} tool calls", "unusable"
            )
        usage = reply.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return Reply(text, reason, tool_calls, counted, server.url)

    def response(self, request: Request, reply: Reply) -> Response | Refusal:
        """Tokenize a reply; a refusal where the chat template cannot render its tool calls."""
        self._compare_prompts(request, reply)
        text, is_cut = reply.text, reply.finish_reason == "length"
        if is_cut:
            text = text.rstrip("\ufffd")  # part of a character, cut at max_tokens
        if not reply.tool_calls:
            ids = [int(id) for id in self._tokenizer(text, add_special_tokens=False)["input_ids"]]
            ids += [] if is_cut else [self._stop_id]
            return Response(request.key, tuple(ids), text, reply.finish_reason)
        turn = {"role": "assistant", "content": text, "tool_calls": list(reply.tool_calls)}
        try:
            ids = chat.answer_ids(self._tokenizer, request.messages, turn, self._thinking, tools=request.tools)
        except DataError as error:
            return Refusal(request.key, str(error))
        return Response(request.key, tuple(ids[:-1] if is_cut else ids), text, reply.finish_reason, reply.tool_calls)

    def _compare_prompts(self, request: Request, reply: Reply) -> None:
        if self._warned or reply.prompt_tokens in (None, len(request.prompt_ids)):
            return
        self._warned = True
        _log.warning(
            "%s counts %s tokens in prompt %s, the target's chat template renders %d here: is it the same template?",
            reply.url,
            reply.prompt_tokens,
            request.key,
            len(request.prompt_ids),
        )


def _call(call: Any) -> dict[str, Any]:
    """Keep the fields of a tool call that OpenAI's form has."""
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    function = {"name": str(function["name"]), "arguments": arguments}
    return {"id": str(call.get("id") or ""), "type": "function", "function": function}
