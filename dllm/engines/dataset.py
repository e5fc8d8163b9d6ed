"""The engine that asks nobody: every prompt is answered with what its source says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dllm.engines.engine import EngineStats, Refusal, Request, RequestSource, Response
from dllm.errors import DataError
from dllm.prompts import template as chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GivenEngine:
    """Answers with the sources' own words, rendered as the target would have said them.

    Args:
        tokenizer: the target's.
        enable_thinking: as the chat template is told.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None = None) -> None:
        self.tokenizer, self.enable_thinking = tokenizer, enable_thinking
        self.pace = EngineStats()

    def describe(self) -> dict[str, Any]:
        """Say that nothing was generated."""
        return {"engine": "given"}

    def answer(self, feed: RequestSource) -> Iterator[Response | Refusal | None]:
        """Answer in the order of the feed; what is longer than the request allows is cut, without a stop id."""
        while (request := feed.take()) is not None:
            yield self._answer(request)

    def _answer(self, request: Request) -> Response | Refusal:
        text = request.response
        if text is None:
            return Refusal(request.key, "the source gives no answer")
        message = {"role": "assistant", "content": text}
        try:
            ids = chat.answer_ids(self.tokenizer, request.messages, message, self.enable_thinking, tools=request.tools)
        except DataError as error:
            return Refusal(request.key, error.message)
        self.pace.tokens += len(ids)
        if len(ids) > request.max_new_tokens:
            ids = ids[: request.max_new_tokens]
            cut = self.tokenizer.decode(ids, skip_special_tokens=True)
            return Response(request.key, tuple(ids), str(cut), "length")
        return Response(request.key, tuple(ids), text, "stop")
