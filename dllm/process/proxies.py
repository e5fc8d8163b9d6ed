"""Keep connections to this machine away from proxies.

Engines, MLflow and Prefect listen on loopback, where the proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names cannot
reach them. urllib, requests, httpx, aiohttp and websockets all read NO_PROXY, and so do child processes.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "127.0.0.0/8")
"""Names as NO_PROXY has them; requests alone reads a network."""
ALIASES = ("localhost", "ip6-localhost", "ip6-loopback")
SOCKS_SCHEMES = {"socks5", "socks5h"}


def bypass_for_loopback() -> None:
    """Add loopback to NO_PROXY for this process and its children, if the environment names a proxy."""
    if not _proxies():
        return
    names = [name.strip() for key in ("no_proxy", "NO_PROXY") for name in os.environ.get(key, "").split(",")]
    joined = ",".join(dict.fromkeys(name for name in [*names, *LOOPBACK] if name))
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*" if "*" in names else joined  # programs read one or the other


def is_this_machine(host: str) -> bool:
    """Return whether an address is this machine's own: loopback, every address (0.0.0.0), or its name."""
    host = host.rstrip(".").lower()
    if host in ALIASES or host.endswith(".localhost") or host == socket.gethostname().lower():
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def drop_unusable() -> list[str]:
    """Remove the variables whose proxies httpx cannot use, and return their names.

    httpx opens every proxy when a client is made, so that a SOCKS proxy without the package socksio would keep
    Prefect's client from its server on loopback.
    """
    unusable = [key for key, value in _proxies().items() if not _is_usable(value)]
    for key in unusable:
        del os.environ[key]
    return unusable


def _proxies() -> dict[str, str]:
    """List the variables that name a proxy for HTTP, HTTPS or everything."""
    keys = ("http_proxy", "https_proxy", "all_proxy")
    return {key: value for key, value in os.environ.items() if key.lower() in keys and value}


def _is_usable(address: str) -> bool:
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        has_host = bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False
    schemes = {"http", "https"} | (SOCKS_SCHEMES if importlib.util.find_spec("socksio") else set())
    return has_host and parts.scheme.lower() in schemes
