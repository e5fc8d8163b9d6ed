"""The target behind an OpenAI-compatible server: many requests in flight, each answered or named in an error.

Owns the client's connections, its patience and its complaints. It drives its event loop from the generator that
yields answers, so an answer is handed over before the next is waited for and nothing outlives the generator.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import logging
import os
from collections.abc import Awaitable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit, urlunsplit

from dllm.config import Regenerate, Target
from dllm.data import chat
from dllm.errors import ConfigError, ServerError
from dllm.serving.engine import Answer, Request

if TYPE_CHECKING:
    import openai
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion
    from transformers import PreTrainedTokenizerBase

URL_VARIABLE = "DLLM_TARGET_URL"
CONNECT_TIMEOUT_S = 10.0
_NO_PROTOCOL = "give the address of an OpenAI-compatible server, which ends in /v1"

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def server_url(base_url: str | None) -> str:
    """Choose the server's address: DLLM_TARGET_URL before `regenerate.base_url`; `/v1` is added to a bare address.

    Raises:
        ConfigError: neither is set, or it is no http address.
    """
    hint = f"set it, or {URL_VARIABLE}, to an address such as http://127.0.0.1:30000/v1"
    found = os.environ.get(URL_VARIABLE) or base_url
    if not found:
        raise ConfigError("engine `openai` needs a server", where="regenerate.base_url", hint=hint)
    parts = urlsplit(found)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"not an http address: {_shown(found)!r}", where="regenerate.base_url", hint=hint)
    return urlunsplit(parts._replace(path="/v1")) if parts.path in ("", "/") else found.rstrip("/")


def served_model(settings: Regenerate, target: Target) -> str:
    """Tell the name a server is asked for."""
    return settings.served_model or target.model


class OpenAIEngine:
    """Ask an OpenAI-compatible server.

    The ids of an answer are its text's, with the template's end of turn where the server says `stop`: servers return
    text, and what the target wrote is not always what its tokenizer would have cut the text into.

    Raises:
        ConfigError: no server address.
    """

    def __init__(self, settings: Regenerate, target: Target, tokenizer: PreTrainedTokenizerBase) -> None:
        self.url = server_url(settings.base_url)
        self.served_model = served_model(settings, target)
        self._settings = settings
        self._tokenizer = tokenizer
        self._stop_id = chat.end_of_turn_id(tokenizer)
        thinking = target.enable_thinking
        self._extra = {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}
        self._warned = False

    def answer(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Answer requests, at most `concurrency` at a time, after checking that the server has the target.

        Raises:
            ServerError: the server is out of reach, serves another model, refuses a row, or fails beyond patience.
        """
        loop = asyncio.new_event_loop()
        client = self._client()
        pending: set[asyncio.Task[Answer]] = set()
        waiting = iter(requests)
        try:
            loop.run_until_complete(self._check(client))
            while True:
                for request in itertools.islice(waiting, self._settings.concurrency - len(pending)):
                    pending.add(loop.create_task(self._ask(client, request)))
                if not pending:
                    return
                done, pending = loop.run_until_complete(asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))
                failures = [error for task in done if (error := task.exception()) is not None]
                # What did finish is handed over before a failure ends the run: it need not be asked again.
                yield from (task.result() for task in done if task.exception() is None)
                if failures:
                    raise failures[0]
        finally:
            loop.run_until_complete(_wind_up(pending, client))
            loop.close()

    def _client(self) -> AsyncOpenAI:
        import openai
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        # openai 2 is built on httpx, openai 3 on its successor: take the one it uses.
        http = importlib.import_module(DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])
        slots = self._settings.concurrency
        is_local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        connections = DefaultAsyncHttpxClient(
            limits=http.Limits(max_connections=slots, max_keepalive_connections=slots),
            timeout=openai.Timeout(self._settings.timeout_s, connect=min(CONNECT_TIMEOUT_S, self._settings.timeout_s)),
            trust_env=not is_local,  # a proxy cannot reach this machine's loopback
        )
        # Its retries back off exponentially with jitter on 408, 409, 429, 5xx, timeouts and lost connections, and
        # follow Retry-After.
        return AsyncOpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=self._settings.max_retries,
            http_client=connections,
        )

    async def _check(self, client: AsyncOpenAI) -> None:
        patient = client.with_options(timeout=CONNECT_TIMEOUT_S, max_retries=min(2, self._settings.max_retries))
        # Raw, because the library trips over a reply that is no JSON, such as a website's.
        reply = await self._explained("the list of models", patient.models.with_raw_response.list())
        try:
            served = [str(model["id"]) for model in json.loads(reply.content)["data"] or []]
        except (ValueError, TypeError, KeyError):
            raise self._error("the reply to the list of models is not the OpenAI protocol", _NO_PROTOCOL) from None
        if self.served_model not in served:
            raise ServerError(
                f"the server serves {', '.join(served) or 'no model'}, not {self.served_model}",
                where=_shown(self.url),
                hint="set regenerate.served_model to the name it serves the target by",
            )

    async def _ask(self, client: AsyncOpenAI, request: Request) -> Answer:
        completion = await self._explained(
            f"prompt {request.key}",
            client.chat.completions.create(
                model=self.served_model,
                messages=request.messages,  # type: ignore[arg-type]
                max_tokens=request.max_new_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                extra_body=self._extra,
            ),
        )
        choices = getattr(completion, "choices", None)
        if not choices:
            raise self._error(f"no choice in the reply to prompt {request.key}", _NO_PROTOCOL)
        reason, message = choices[0].finish_reason, choices[0].message
        if reason not in ("stop", "length"):
            raise self._error(
                f"prompt {request.key} ended with finish_reason {reason!r}, expected stop or length",
                hint="look into the server's log",
            )
        extra = message.model_extra or {}
        if extra.get("reasoning_content") or extra.get("reasoning"):
            raise self._error(
                f"the server keeps the reasoning apart from the answer to prompt {request.key}",
                hint="start it without a reasoning parser, so that the answer is whole",
            )
        self._compare_prompts(request, completion)
        return self._to_answer(request, message.content or "", reason)

    async def _explained(self, what: str, call: Awaitable[_T]) -> _T:
        """Await a call to the server; turn its failures into one line that names `what` was asked."""
        import openai

        try:
            return await call
        except openai.APITimeoutError:
            raise self._error(
                f"no answer to {what} within {self._settings.timeout_s:g} s",
                hint="raise regenerate.timeout_s, or lower regenerate.concurrency",
            ) from None
        except openai.APIConnectionError as error:
            reason = f" ({error.__cause__})" if error.__cause__ and str(error.__cause__) else ""
            raise self._error(
                f"cannot reach the server{reason} to ask for {what}",
                hint=f"start it, or set regenerate.base_url or {URL_VARIABLE}; finished answers are kept",
            ) from None
        except openai.APIStatusError as error:
            raise self._refusal(what, error) from None
        except (openai.OpenAIError, ValueError) as error:
            line = str(error).strip().split("\n")[0]
            raise self._error(f"the reply to {what} is not the OpenAI protocol: {line[:200]}", _NO_PROTOCOL) from None

    def _refusal(self, what: str, error: openai.APIStatusError) -> ServerError:
        detail = " ".join(str(error.message).split())[:300]
        hint = "finished answers are kept; look into the server's log, then run this again"
        if error.status_code in (401, 403):
            hint = "set OPENAI_API_KEY"
        elif error.status_code == 404:
            hint = _NO_PROTOCOL
        elif error.status_code < 500 and error.status_code != 429:
            hint = "the request does not fit the server: look at its context length and the chat template"
        return self._error(f"the server answered {error.status_code} to {what}: {detail}", hint)

    def _error(self, message: str, hint: str) -> ServerError:
        return ServerError(message, where=_shown(self.url), hint=hint)

    def _compare_prompts(self, request: Request, completion: ChatCompletion) -> None:
        usage = completion.usage
        if self._warned or usage is None or usage.prompt_tokens == len(request.prompt_ids):
            return
        self._warned = True
        _log.warning(
            "%s counts %d tokens in prompt %s, the target's chat template here makes %d: is it the same template?",
            _shown(self.url),
            usage.prompt_tokens,
            request.key,
            len(request.prompt_ids),
        )

    def _to_answer(self, request: Request, text: str, reason: str) -> Answer:
        if reason == "length":
            text = text.rstrip("\ufffd")  # half a character, cut by the limit
        ids = [int(id) for id in self._tokenizer(text, add_special_tokens=False)["input_ids"]]
        if reason == "stop":
            ids.append(self._stop_id)
        return Answer(request.key, tuple(ids), text, reason)


async def _wind_up(pending: set[asyncio.Task[Answer]], client: AsyncOpenAI) -> None:
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    await client.close()


def _shown(url: str) -> str:
    """Leave user name and password out of an address."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
