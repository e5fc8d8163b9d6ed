"""The servers of a run: where they are, how they are spoken to, and how each is doing.

Owns addresses and what is secret in them. Who changes a server's state is `pool`.
"""

from __future__ import annotations

import asyncio
import base64
import os
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from dllm.errors import ConfigError

URL_VARIABLE = "DLLM_TARGET_URL"
KEY_VARIABLE = "OPENAI_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HINT = f"set it, or {URL_VARIABLE}, to an address such as http://127.0.0.1:30000/v1"


def server_urls(configured: Sequence[str]) -> list[str]:
    """Choose the servers' addresses: DLLM_TARGET_URL before `regenerate.servers`, each once and ending in a path.

    Raises:
        ConfigError: there is none, or one is no http address.
    """
    from_environment = [url.strip() for url in os.environ.get(URL_VARIABLE, "").split(",")]
    found = list(filter(None, from_environment)) or list(configured)
    if not found:
        raise ConfigError("engine `openai` needs a server", where="regenerate.servers", hint=_HINT)
    return list(dict.fromkeys(map(server_url, found)))


def server_url(url: str) -> str:
    """Bring one address into the form requests are made from; `/v1` is added to a bare one.

    Raises:
        ConfigError: it is no http address.
    """
    try:
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_http = False
    if not is_http:
        raise ConfigError(f"not an http address: {shown(url)!r}", where="regenerate.servers", hint=_HINT)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") or "/v1"))


def shown(url: str) -> str:
    """Leave user name and password out of an address."""
    scheme, mark, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}{mark}{place.rpartition('@')[2]}{slash}{path}" if mark else url.rpartition("@")[2]


@dataclass(eq=False)
class Server:
    """One server as a run sees it."""

    url: str
    """Ends in /v1 or the like; without credentials."""
    headers: dict[str, str] = field(repr=False)
    proxy: str | None = None
    in_flight: int = 0
    state: Literal["up", "held", "gone", "wrong_model"] = "up"
    """`held`: it failed and is about to be probed; `gone`: the probe failed too; `wrong_model`: not the model."""
    reason: str = ""
    """Why it is not up."""
    failures: int = 0
    """Faults since its latest answer."""
    drops: int = 0
    """Times it was dropped since its latest answer."""
    waits: set[asyncio.Timeout] = field(default_factory=set, repr=False)
    """The patience of each request in flight here."""

    @classmethod
    def at(cls, url: str) -> Server:
        """Make the server of an address; credentials in it go before OPENAI_API_KEY, proxies are the environment's."""
        parts = urlsplit(url)
        key = f"Bearer {os.environ.get(KEY_VARIABLE) or 'none'}"
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            key = f"Basic {base64.b64encode(pair.encode()).decode()}"
        return cls(shown(url), {"Authorization": key, "Content-Type": "application/json"}, _proxy(parts))


def _proxy(url: SplitResult) -> str | None:
    """Find the proxy the environment names for an address; none reaches this machine's loopback."""
    host = url.hostname or ""
    found = (
        None if host in LOOPBACK or urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(url.scheme)
    )
    if found and "://" not in found:
        found = f"http://{found}"
    return found if found and found.startswith("http") else None
