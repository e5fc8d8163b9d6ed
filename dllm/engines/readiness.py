"""When a server that was just started can be used: it is healthy, has the model that was asked for, and writes a token.

A server answers on its port long before it can generate, and some answer "healthy" and then never write a word. So
only a token counts.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from dllm.errors import ServerError
from dllm.process.children import Background

LOOK_EVERY_S = 0.5
SAY_EVERY_S = 15.0
ANSWER_S = 10.0
"""Patience with one answer that needs no model."""


def await_token(url: str, model: str, child: Background, *, name: str, path: str | None, timeout_s: float) -> None:
    """Wait until a server that was just started has written a token as the model asked for.

    Args:
        url: its address without /v1.
        model: the name it must serve.
        child: its process; the wait is over when it has ended.
        name: what it is called in messages.
        path: the model directory it must report at /model_info; None does not ask.
        timeout_s: patience with all of it.

    Raises:
        ServerError: it serves something else, writes no token, or not in time. None is raised when it has ended: that
            is the caller's to explain.
    """
    began = time.monotonic()
    patience = _Patience(name, url, began, began + timeout_s, child)
    for _ in patience.tries("never became healthy"):
        if _get(f"{url}/health") is not None:
            break
    if child.ended:
        return
    _check_model(url, model, name, path)
    for _ in patience.tries("is healthy but wrote no token"):
        if _writes_a_token(url, model, name, patience.left_s):
            return


class _Patience:
    """The time that is left, and a line now and then for whoever waits."""

    def __init__(self, name: str, url: str, began: float, end: float, child: Background) -> None:
        self._name, self._url, self._began, self._end, self._child = name, url, began, end, child
        self._said = began

    @property
    def left_s(self) -> float:
        return max(self._end - time.monotonic(), 0.1)

    def tries(self, complaint: str) -> Iterator[None]:
        """Go on until the child has ended; raise when the time is up."""
        while not self._child.ended:
            yield
            now = time.monotonic()
            if now > self._end:
                raise ServerError(
                    f"{self._name} {complaint} within {self._end - self._began:g} s",
                    where=self._url,
                    hint="look into its log, or raise regenerate.sglang.start_timeout_s",
                )
            if now - self._said > SAY_EVERY_S:
                self._said = now
                last = next((line for line in reversed(self._child.tail) if line.strip()), "none").strip()
                print(f"{self._name}: not ready after {now - self._began:.0f} s; its last line: {last[:200]}",
                      file=sys.stderr, flush=True)  # fmt: skip
            time.sleep(LOOK_EVERY_S)


def _check_model(url: str, model: str, name: str, path: str | None) -> None:
    listed = _get(f"{url}/v1/models") or {}
    served = [str(entry.get("id")) for entry in listed.get("data", []) if isinstance(entry, dict)]
    if model not in served:
        raise ServerError(f"{name} serves {', '.join(served) or 'nothing'}, asked for was {model}", where=url)
    reported = path and (_get(f"{url}/model_info") or {}).get("model_path")
    if reported and reported != path:
        raise ServerError(f"{name} has the model of {reported}, asked for was {path}", where=url)


def _writes_a_token(url: str, model: str, name: str, timeout_s: float) -> bool:
    """Ask for one token; False where asking again may help."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0}
    try:
        answer = _send(f"{url}/v1/chat/completions", body, timeout_s)
        usage, choices = answer.get("usage") or {}, answer["choices"]
        return bool(usage.get("completion_tokens") or choices[0]["message"].get("content"))
    except urllib.error.HTTPError as error:
        if error.code in (429, 503):
            return False
        said = " ".join(error.read(4000).decode("utf-8", "replace").split())[:300]
        raise ServerError(f"{name} answered {error.code} to its first request: {said}", where=url) from None
    except (OSError, http.client.HTTPException):  # died, or its patience is over
        return False
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ServerError(f"{name} does not answer by the OpenAI protocol", where=url) from None


def _get(address: str) -> dict[str, Any] | None:
    """Fetch an address; None where there is no good answer. A body that is no JSON object counts as empty."""
    try:
        return _send(address, None, ANSWER_S)
    except (OSError, http.client.HTTPException):  # HTTPError is an OSError
        return None
    except ValueError:
        return {}


def _send(address: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    # No proxy: the address is this machine's own.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s) as answer:
        found = json.loads(answer.read())
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found
