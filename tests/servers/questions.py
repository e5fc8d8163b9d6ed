"""One question to a server, and one figure of what it counts."""

from __future__ import annotations

import json
import urllib.request

from dllm.prompts.chats.turns import Message
from tests.patience import LONGEST_S
from tests.servers.conftest import SERVED


def ask(url: str, question: str | list[Message], max_tokens: int, timeout_s: float = 300.0) -> str:
    """Return a server's greedy answer to a question or a chat."""
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    body = {"model": SERVED, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return str(json.loads(answer.read())["choices"][0]["message"]["content"])


def metrics(url: str) -> dict[str, float]:
    """Read a server's counters: each by its name and labels, and the sum over labels by the name alone."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=LONGEST_S) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line and not line.startswith("#"):
            labelled, value = line.rsplit(" ", 1)
            name = labelled.partition("{")[0]
            found[labelled] = float(value)
            if name != labelled:
                found[name] = found.get(name, 0.0) + float(value)
    return found


def metric(url: str, name: str) -> float:
    """Read one of them."""
    return metrics(url)[name]
