"""Chat completions: a request as JSON, and a server's reply as token ids.

Servers return text, so the ids of a response are those that the tokenizer gives its text, with the template's end of
turn where the server says `stop`; the target may have generated other ids for the same text. A response that calls
tools has the ids that the chat template renders for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dllm.config.params import Target
from dllm.engines.defects import ENDINGS, defect
from dllm.engines.engine import Refusal, Request, Response
from dllm.engines.openai.faults import Fault, Refused, one_line
from dllm.engines.openai.servers import Server
from dllm.errors import DataError, ServerError
from dllm.prompts import template as chat
from dllm.prompts.chats.turns import Message

OTHER_ENDINGS = {
    "function_call": "tool_calls",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "max_tokens": "length",
}
"""What servers say for some of `ENDINGS`: older ones of OpenAI's, TGI by its own protocol, gateways to Anthropic."""
_THINKING = re.compile("reasoning|think|thought", re.IGNORECASE)
"""In the name of a field of a message: it holds the reasoning."""
LEAST_DIFFERENCE = 32
"""Differences of fewer tokens mean nothing: a text may be split otherwise than it was generated."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """The part of a server's reply that is used."""

    text: str
    finish_reason: str
    tool_calls: tuple[dict[str, Any], ...]
    prompt_tokens: int | None
    """As counted by the server, like `tokens`; None where it does not say."""
    tokens: int | None
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
        # As SentencePiece does, which puts the mark of a word's start before the first word of a text.
        self._marks_start = _ends_otherwise(tokenizer)
        self._warned: set[str] = set()

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
            Refused: the model refuses this request.
            ServerError: the server separates the reasoning.
        """
        try:
            choice = reply["choices"][0]
            message, reason = choice["message"], choice["finish_reason"]
            text, calls = message.get("content") or "", message.get("tool_calls") or []
            if not calls and (older := message.get("function_call")):
                calls = [{"function": older}]
            refusal = "" if text or calls else message.get("refusal")
            tool_calls = tuple(_call(call) for call in calls)
            if isinstance(text, list) and all(part.get("type") == "text" for part in text):
                text = "".join(part["text"] for part in text)
        except (TypeError, KeyError, IndexError, AttributeError, ValueError, RecursionError):
            shown = one_line(json.dumps(reply, ensure_ascii=False), 300)
            raise Fault(f"the reply is not a chat completion: {shown}", "outage") from None
        if not isinstance(text, str):
            raise Fault(f"the reply is not a chat completion: its content is a {type(text).__name__}", "outage")
        self._check_model(server, reply.get("model"))
        if refusal:  # words in place of a response, which would be stored as an empty one
            raise Refused(f"the model refuses: {one_line(str(refusal))}")
        if field := _separated_reasoning(message):
            raise ServerError(
                f"the server separates the reasoning from the response, as {one_line(field, 80)}",
                where=server.url,
                hint="start it without a reasoning parser, so that the response is complete",
            )
        reason = OTHER_ENDINGS.get(reason, reason) if isinstance(reason, str) else reason
        if reason == "stop" and tool_calls:
            reason = "tool_calls"  # some servers say `stop` where tool_choice names the tool
        if reason not in ENDINGS or (reason == "tool_calls" and not tool_calls):
            shown = one_line(repr(reason), 80)
            raise Fault(f"the response ended with finish_reason {shown} and {len(tool_calls)} tool calls", "unusable")
        return Reply(text, reason, tool_calls, *_usage(reply), server.url)

    def response(self, request: Request, reply: Reply) -> Response | Refusal:
        """Tokenize a reply; a refusal where it cannot be stored, or the chat template cannot render its tool calls.

        What looks like a special token in a text is text: servers leave special tokens out.
        """
        text, is_cut = reply.text, reply.finish_reason == "length"
        if is_cut:
            text = text.rstrip("\ufffd")  # part of a character, cut at max_tokens
        untokenized = Response(request.key, (), text, reply.finish_reason, reply.tool_calls)
        if (reason := defect(untokenized)) is not None:
            return Refusal(request.key, f"{reason} ({reply.url})", is_transient=True)
        if reply.tool_calls:
            if unknown := _unknown_calls(request, reply):
                return Refusal(request.key, f"the response calls {unknown} ({reply.url})", is_transient=True)
            turn = {"role": "assistant", "content": text, "tool_calls": list(reply.tool_calls)}
            try:
                ids = chat.answer_ids(self._tokenizer, request.messages, turn, self._thinking, tools=request.tools)
            except DataError as error:
                return Refusal(request.key, str(error))
            ids = ids[:-1] if is_cut else ids
        else:
            ids = self._text_ids(request, text) + ([] if is_cut else [self._stop_id])
        self._compare(request, reply, len(ids))
        return replace(untokenized, token_ids=tuple(ids))

    def _text_ids(self, request: Request, text: str) -> list[int]:
        """Tokenize a response's text, where that depends on it, as the text after its prompt."""
        if self._marks_start and text:
            turn: Message = {"role": "assistant", "content": text}
            with contextlib.suppress(DataError):
                ids = chat.answer_ids(self._tokenizer, request.messages, turn, self._thinking, tools=request.tools)[:-1]
                if self._tokenizer.decode(ids) == text:  # some templates strip it, or leave its reasoning out
                    return ids
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return [int(id) for id in encoded["input_ids"]]

    def _check_model(self, server: Server, model: Any) -> None:
        """Check the name that a server replies under: the one asked for, or another of the same model."""
        if model in (None, "", self._model):  # some proxies leave it empty
            return
        if not isinstance(model, str):
            raise Fault(f"the reply is not a chat completion: its model is a {type(model).__name__}", "outage")
        if model not in server.names:
            shown = one_line(model, 200)
            hint = f"; if that is the target, ask for {shown!r} (regenerate.served_model, or --model)"
            raise Fault(f"the server answered as {shown!r}, not as {self._model!r}{hint}", "wrong_model")

    def _compare(self, request: Request, reply: Reply, num_ids: int) -> None:
        """Warn once of each count in which a server and this tokenizer differ."""
        asked, told = len(request.prompt_ids), reply.tokens
        if reply.prompt_tokens not in (None, asked):
            counts = f"counts {reply.prompt_tokens} tokens in prompt {request.key}"
            self._warn(reply, f"{counts}, the target's chat template renders {asked} here: is it the same template?")
        if told is not None and told > 2 * num_ids + LEAST_DIFFERENCE:
            counts = f"counts {told} tokens in response {request.key}, its text has {num_ids}"
            self._warn(reply, f"{counts}: does it leave a part out, such as the reasoning?")
        if reply.finish_reason == "length" and 2 * max(num_ids, told or 0) + LEAST_DIFFERENCE < request.max_new_tokens:
            cut = f"cut response {request.key} after {num_ids} tokens, and {request.max_new_tokens} were asked for"
            self._warn(reply, f"{cut}: has it a limit of its own?")

    def _warn(self, reply: Reply, what: str) -> None:
        kind = what.rpartition(": ")[2]
        if kind not in self._warned:
            self._warned.add(kind)
            _log.warning("%s %s", reply.url, what)


def _ends_otherwise(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a text has other ids at its beginning than after a line break."""
    line, word, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", "x", "\nx"))
    return both != line + word


def _separated_reasoning(message: dict[str, Any]) -> str | None:
    """Name the field of a message that holds the reasoning, which the text then lacks."""
    return next((key for key, value in message.items() if _THINKING.search(key) and _holds_text(value)), None)


def _holds_text(value: Any) -> bool:
    return bool(value) and isinstance(value, str | list | dict)


def _unknown_calls(request: Request, reply: Reply) -> str | None:
    """Name a tool that a reply calls and that its request, which has tools, does not offer."""
    offered = {tool["function"]["name"] for tool in request.tools or ()}
    called = (call["function"]["name"] for call in reply.tool_calls)
    unknown = next((name for name in called if name not in offered), None) if offered else None
    return None if unknown is None else f"the tool {one_line(unknown, 80)}, which its request does not offer"


def _usage(reply: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return the tokens that a server counts in the prompt and in the response."""
    usage = reply.get("usage")
    counted = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, response = (count if type(count) is int else None for count in counted)
    return prompt, response


def _call(call: Any) -> dict[str, Any]:
    """Keep the fields of a tool call that OpenAI's form has."""
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    id, name = call.get("id") or "", function["name"]
    if not (isinstance(id, str) and isinstance(name, str)):
        raise TypeError
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
