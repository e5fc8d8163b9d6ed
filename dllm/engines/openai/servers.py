"""The servers of a run: their addresses, credentials and proxies, and the state of each."""

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
from dllm.process.proxies import is_this_machine

URL_VARIABLE = "DLLM_TARGET_URL"
KEY_VARIABLE = "OPENAI_API_KEY"
_HINT = f"set it, or {URL_VARIABLE}, to an address such as http://127.0.0.1:30000/v1"


@dataclass(eq=False)
class Server:
    """One server and its state in this run; `pool` changes the state."""

    url: str
    """Ends in /v1 or the like; without credentials."""
    headers: dict[str, str] = field(repr=False)
    proxy: str | None = None
    state: Literal["up", "held", "down", "wrong_model"] = "up"
    """`held`: it failed and is about to be probed; `down`: the probe failed too; `wrong_model`: never used again."""
    reason: str = ""
    """Why it is not up."""
    in_flight: int = 0
    failures: int = 0
    """Faults since its latest response."""
    drops: int = 0
    """Times it was dropped since its latest response."""
    deadlines: set[asyncio.Timeout] = field(default_factory=set, repr=False)
    """The timeout of each exchange in flight."""
    names: frozenset[str] = frozenset()
    """All names under which it serves the model that a run asks for."""
    access_hint: str = f"set {KEY_VARIABLE}"
    """What to do where it denies access."""

    @classmethod
    def at(cls, url: str) -> Server:
        """Make the server of an address; credentials in it override OPENAI_API_KEY, proxies are the environment's.

        Raises:
            ConfigError: the key holds what no HTTP header may hold.
        """
        parts, key = urlsplit(url), os.environ.get(KEY_VARIABLE) or ""
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            sent = f"Basic {base64.b64encode(pair.encode()).decode()}"
            hint = f"correct user and password in the address, or leave them out and set {KEY_VARIABLE}"
        else:
            sent, hint = f"Bearer {key or 'none'}", f"set {KEY_VARIABLE}" + " to a key that it accepts" * bool(key)
            if not _is_header(key):
                raise ConfigError(
                    "the key holds a line break, a blank or another character that no HTTP header may hold",
                    where=KEY_VARIABLE,
                    hint="set it to the key alone",
                )
        headers = {"Authorization": sent, "Content-Type": "application/json"}
        return cls(without_credentials(url), headers, _proxy(parts), access_hint=hint)


def _is_header(text: str) -> bool:
    return all("!" <= sign <= "~" for sign in text)


def server_urls(configured: Sequence[str]) -> list[str]:
    """Choose the servers' addresses: DLLM_TARGET_URL before `regenerate.servers`; no duplicates, each with a path.

    Raises:
        ConfigError: there is none, or one is not an http address.
    """
    from_environment = [url.strip() for url in os.environ.get(URL_VARIABLE, "").split(",")]
    found = list(filter(None, from_environment)) or list(configured)
    if not found:
        raise ConfigError("engine `openai` needs a server", where="regenerate.servers", hint=_HINT)
    return list(dict.fromkeys(map(server_url, found)))


def server_url(url: str) -> str:
    """Normalize one address; `/v1` is added where it has no path.

    Raises:
        ConfigError: it is not an http address.
    """
    if not _is_address(url):
        raise ConfigError(f"not an http address: {without_credentials(url)!r}", where="regenerate.servers", hint=_HINT)
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") or "/v1"))


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        is_http = parts.scheme in ("http", "https") and bool(host) and parts.port != 0
    except ValueError:
        return False
    return is_http and not parts.query and not parts.fragment and url.isprintable() and not set(url) & set(" \\")


def without_credentials(url: str) -> str:
    """Remove user name and password from an address."""
    scheme, mark, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}{mark}{place.rpartition('@')[2]}{slash}{path}" if mark else url.rpartition("@")[2]


def _proxy(url: SplitResult) -> str | None:
    """Find the environment's http proxy for an address; this machine's own addresses have none."""
    host = url.hostname or ""
    if is_this_machine(host) or urllib.request.proxy_bypass(host):
        return None
    found = urllib.request.getproxies().get(url.scheme)
    if found and "://" not in found:
        found = f"http://{found}"
    return found if found and found.startswith("http") else None
