"""The engine that generates nothing: it takes each response from the dataset, and renders it with the chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dllm.config.params import Params, Target
from dllm.config.regenerate import Regenerate
from dllm.engines.engine import EngineStats, Refusal, Request, RequestSource, Response, refuse_servers
from dllm.errors import ConfigError, DataError
from dllm.prompts import template as chat


class DatasetEngine:
    """Return each request's own `response`, as the ids that the target would have generated it with.

    Args:
        tokenizer: the target's.
        enable_thinking: passed to chat templates that know it; None leaves it out.
    """

    affects: frozenset[str] = frozenset()
    ignores = frozenset({"temperature", "top_p", "seed", "batch_size", "concurrency", "timeout_s", "max_retries"})
    is_external = False
    generates = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None = None) -> None:
        self.stats = EngineStats()
        self._tokenizer, self._enable_thinking = tokenizer, enable_thinking

    @classmethod
    def check(cls, settings: Regenerate) -> None:
        refuse_servers(settings)
        if settings.turns != "last":
            raise ConfigError(
                f"engine {settings.engine} takes the last response of a chat only",
                where=f"regenerate.turns: {settings.turns}",
                hint="set it to last",
            )

    @classmethod
    def check_target(cls, target: Target) -> None:
        pass

    @classmethod
    def num_slots(cls, settings: Regenerate) -> int:
        return 1

    @classmethod
    @contextmanager
    def open(
        cls, params: Params, tokenizer: PreTrainedTokenizerBase, root: Path, servers: Sequence[str] | None = None
    ) -> Iterator[DatasetEngine]:
        yield cls(tokenizer, params.target.enable_thinking)

    def describe(self) -> dict[str, Any]:
        return {"engine": "dataset"}

    def answer(self, requests: RequestSource) -> Iterator[Response | Refusal | None]:
        """Respond in the order of the requests; a response longer than `max_new_tokens` is cut, without a stop id."""
        while (request := requests.take()) is not None:
            yield self._answer(request)

    def _answer(self, request: Request) -> Response | Refusal:
        if request.response is None:
            return Refusal(
                request.key, "the dataset has no response that is one text, without calls or reasoning beside it"
            )
        turn = {"role": "assistant", "content": request.response}
        try:
            ids = chat.answer_ids(self._tokenizer, request.messages, turn, self._enable_thinking, tools=request.tools)
        except DataError as error:
            return Refusal(request.key, error.message)
        self.stats.tokens += len(ids)
        if len(ids) > request.max_new_tokens:
            ids = ids[: request.max_new_tokens]
            cut = self._tokenizer.decode(ids, skip_special_tokens=True)
            return Response(request.key, tuple(ids), str(cut), "length")
        return Response(request.key, tuple(ids), request.response, "stop")
