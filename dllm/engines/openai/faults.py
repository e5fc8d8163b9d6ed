"""What can go wrong with a request to a server: the kinds of fault, and which of them a reply is.

A reply counts as what it says: an error inside a reply with status 200 is judged by the code inside.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple

from dllm import outside
from dllm.engines.openai.servers import Server
from dllm.errors import ServerError
from dllm.outside import JsonError, parse_json
from dllm.secrets import hide

FaultKind = Literal["unreachable", "outage", "timeout", "busy", "unusable", "not_found", "wrong_model"]


class FaultRule(NamedTuple):
    """What a kind of fault costs the request and the server."""

    meaning: str
    costs_try: Literal["never", "shared", "always"]
    """Whether it uses up one of the request's tries: `shared` does so where no other server is left to try."""
    counts: bool
    """Whether several in a row drop the server until it responds again."""
    rechecks: bool = False
    """Whether the server is asked again at once which models it serves."""


FAULTS: Mapping[FaultKind, FaultRule] = {
    "unreachable": FaultRule("nothing was sent", "never", counts=True),
    "outage": FaultRule("the server broke down", "shared", counts=True),
    "timeout": FaultRule("the server took too long", "always", counts=True),
    "busy": FaultRule("the server asks to retry later", "shared", counts=False),
    "unusable": FaultRule("the reply cannot be used", "always", counts=False),
    "not_found": FaultRule("the server does not know the path or the model", "never", counts=False, rechecks=True),
    "wrong_model": FaultRule("another model replied", "never", counts=False, rechecks=True),
}
"""Beside these, `Refused` ends a request, and a ServerError ends the run."""

BUSY = (408, 409, 425, 429)
SAYING = ("error", "errors", "message", "detail", "msg", "status_msg", "base_resp")
"""Keys under which servers say what is wrong."""
MAX_REASON = 2000
"""Characters of a server's own words that are kept."""


class Fault(Exception):
    """A failed try of a request; another try, or another server, may succeed.

    Args:
        reason: one line.
        retry_after_s: the pause that the server asks for, in seconds.
        status: the HTTP status of the reply; None where there was no reply.
    """

    def __init__(
        self, reason: str, kind: FaultKind, retry_after_s: float | None = None, status: int | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.kind, self.retry_after_s, self.status = reason, kind, retry_after_s, status


class Refused(Exception):
    """A request gets no response: its server refuses it, or replies with what nobody asked for.

    Args:
        reason: one line.
        is_transient: whether a later run may succeed.
    """

    def __init__(self, reason: str, is_transient: bool = False) -> None:
        super().__init__(reason)
        self.is_transient = is_transient


def read_reply(server: Server, status: int, headers: Mapping[str, str], data: bytes) -> Any:
    """Return the JSON of a reply that is no error.

    Raises:
        Fault: another try may succeed.
        Refused: the server refuses this request.
        ServerError: it denies access.
    """
    if status != 200:
        try:
            words = _words(parse_json(data))
        except JsonError:
            words = ""
        raise _failure(server, status, f"the server answered {status}: {words or _shown(data)}", headers)
    value = _json(data)
    if (error := _error_in(value)) is not None:
        code = _code_in(error, value)
        named = f"error {code}" if code else "an error"
        words = _words(error) or _shown(data, 300)
        raise _failure(server, code or status, f"the server answered with {named}: {words}", headers)
    return value


def _failure(server: Server, status: int, what: str, headers: Mapping[str, str]) -> Exception:
    """Judge a reply by its status, or by the code of the error in it."""
    retry_after = headers.get("Retry-After")
    if status in (401, 403):
        return ServerError(what, where=server.url, hint=server.access_hint)
    if status == 407:
        return ServerError(what, where=server.url, hint="give the proxy's user and password in http_proxy")
    if 300 <= status < 400:
        return Fault(f"{what} (to {one_line(headers.get('Location', 'nowhere'), 200)})", "not_found", status=status)
    if status in (404, 405):
        return Fault(what, "not_found", status=status)
    if status in BUSY or status >= 500:
        # A server that names a time works, and is only overloaded.
        kind: FaultKind = "busy" if status in BUSY or (status == 503 and retry_after) else "outage"
        return Fault(what, kind, retry_after_s(retry_after), status)
    if status >= 400:
        return Refused(what)
    return Fault(what, "unusable", status=status)


def retry_after_s(header: str | None) -> float | None:
    """Parse a Retry-After header, seconds or an HTTP date; None where it is absent or invalid. Units: seconds."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def one_line(text: str, limit: int = MAX_REASON) -> str:
    """Make one visible line of a server's words, without secrets: some servers repeat a wrong key."""
    return outside.one_line(hide(text), limit)


def _json(data: bytes) -> Any:
    try:
        return parse_json(data)
    except JsonError as error:
        if "nested" in str(error):
            raise Refused(f"the reply cannot be used: {error}", is_transient=True) from None
        # What looks like JSON needs the reason: a number that it has not, or bytes that are not UTF-8.
        why = f" ({error})" if data.lstrip().startswith((b"{", b"[")) else ""
        raise Fault(f"the reply is not JSON: {_shown(data, 200)!r}{why}", "outage", status=200) from None


def _shown(data: bytes, limit: int = MAX_REASON) -> str:
    return one_line(hide(data[: 4 * limit].decode(errors="replace")), limit)


def _error_in(value: Any) -> Any:
    """Find the error that a reply holds in place of what was asked for; None where there is none."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0]
    if not isinstance(value, dict):
        return None
    if found := value.get("error") or value.get("errors"):
        return found[0] if isinstance(found, list) and len(found) == 1 else found
    choices = value.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict) and choices[0].get("error"):
        return choices[0]["error"]
    is_other = not choices and value.get("data") is None
    says = value.get("object") == "error" or (is_other and any(value.get(name) for name in SAYING))
    return value if says else None


def _code_in(*places: Any) -> int | None:
    """Find the HTTP status that an error names."""
    for place in places:
        for name in ("code", "status", "status_code"):
            code = place.get(name) if isinstance(place, dict) else None
            if isinstance(code, int | str) and re.fullmatch("[45][0-9][0-9]", str(code)):
                return int(code)
    return None


def _words(said: Any) -> str:
    """Extract an error message from any of the forms that servers use; empty where there is none."""
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    while isinstance(said, dict):
        said = next((said[name] for name in SAYING if said.get(name)), None)
    return "" if said is None else one_line(hide(str(said)), MAX_REASON)
