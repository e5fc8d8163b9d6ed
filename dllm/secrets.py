"""Hide secrets in text before it leaves the process: on the console, in logs, records, MLflow and Prefect.

Secret are the values of environment variables named like keys, tokens and passwords, user and password in any URL, and
text of the forms that credentials have. `hide` is the only function that decides; every door calls it, before it cuts
or formats a text further: half a password is not recognized.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TextIO
from urllib.parse import quote, unquote

from dllm.outside import harmless

HIDDEN = "***"

_SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|PASSPHRASE|SECRET|APIKEY|CREDENTIAL|CONNECTION_STRING"
    r"|_PWD$|(KEY|TOKEN|AUTH|PASS)S?(_|$)",
    re.IGNORECASE,
)
_NOT_SECRET_NAME = re.compile(r"(_FILE|_PATH|_DIR|_SOCK|_CERT|_NAME|_URL|_URI)$", re.IGNORECASE)
_USER_NAME = re.compile(r"(.*_)?(USERNAME|USER)$", re.IGNORECASE)
_SHORTEST = 4
_SHORTEST_WORD = 8
"""Shorter values made of letters, or of digits, alone are not searched for: `none`, `EMPTY` and `1234` stand in any
text for something else. In a URL they are hidden all the same."""
_SHORTEST_START = 6

_QUERY_NAME = (
    r"(?:[\w.-]*(?:token|password|passwd|secret|signature|credential|api[_-]?key|access[_-]?key)[\w-]*"
    r"|key|auth|pwd|pass|sig)"
)
_COLON = r"(?::|%3A)"
_SLASHES = r"(?:(?:\\?/|%2F){2})"
_SCHEME = r"\b[a-z][a-z0-9+.-]{0,30}"  # bounded: a long word would take quadratic time
_HOST = r"(?:localhost\b|[\w.-]+:\d{1,5}(?!\w)|(?:[\w-]+\.)+[a-z]{2,}\b(?!\()|\d+\.\d+\.\d+\.\d+)"
_QUOTE = r"\\{0,8}['\"]"  # bounded, as all repetitions that another may follow
_LABEL = r"(?:mailto|e-?mail|contact|from|to|cc|bcc|author|sips?|xmpp|acct|rank)"
_PASSWORD = r"[^\s/@'\"()\[\]{},]{2,200}"
"""Of a login without a scheme, where `0:n]@W.mT` is code."""
_KEY_NAME = (
    r"[\w.-]{0,40}(?:password|passwd|api[_-]?key|access[_-]?key|secret(?:[_-]?key)?|(?:access|auth|refresh)[_-]?token)"
)
_SHAPES = tuple(
    (re.compile(pattern, re.IGNORECASE), instead)
    for pattern, instead in (
        # user:password@ of a URL; its slashes, or all of it, may be escaped
        (rf"({_SCHEME}{_COLON}{_SLASHES})[^\s/?#'\"<>]*(@|%40)", rf"\1{HIDDEN}\2"),
        # a password with a slash or a hash in it
        (rf"({_SCHEME}://)[^\s/:@'\"]*:(?!\d+[/?#])[^\s@:'\"]*@", rf"\1{HIDDEN}@"),
        # a URL that was cut before its @: what follows the colon is no port
        (rf"({_SCHEME}://)[^\s/:@'\"\[\]]+:[^\s/@:'\"\[\]]*[^\s/@:'\"\d\[\]),.;…][^\s/@:'\"]*$", rf"\1{HIDDEN}"),
        # the same without a scheme: an address, not `image:tag@sha256:...` or mailto:
        (r"((?:^|[\s'\"(=,])//)[^\s/:@'\"]*:[^\s/@'\"]*@", rf"\1{HIDDEN}@"),
        (rf"(?<![\w.+%/-])(?!{_LABEL}:|\d+:)[\w.+%-]{{1,64}}:(?!\d+@){_PASSWORD}@(?={_HOST})", f"{HIDDEN}@"),
        # ?token=...
        (rf"([?&;]{_QUERY_NAME}(?:=|%3D))[^&;#\s'\"<>)\]}}]+", rf"\1{HIDDEN}"),
        # a header's value
        (r"\b((?:Basic|Bearer)\s+)(?=[\w.~+/-]*[\d=])[\w.~+/=-]{6,}", rf"\1{HIDDEN}"),
        (r"(\b(?:x-[\w-]{0,30})?(?:api-?key|auth-token):\s*)[^\s'\",}]+", rf"\1{HIDDEN}"),
        # a value of JSON, or of a printed mapping
        (rf"((?<!\\){_QUOTE}{_KEY_NAME}{_QUOTE}\s{{0,8}}:\s{{0,8}}{_QUOTE})[^'\"\\]+", rf"\1{HIDDEN}"),
        # --api-key ..., also as a list
        (
            r"((?:^|\s|['\"])--?(?:[\w-]+-)?(?:api-key|password|token|secret)(?:=|\s+|['\"],\s*['\"]))[^\s'\",\]]+",
            rf"\1{HIDDEN}",
        ),
        # of a database's connection string
        (r"\b((?:password|passwd|pwd|api_?key|secret_?key)=)[^\s&;,'\")]+", rf"\1{HIDDEN}"),
    )
)
_OPTION = re.compile(r"^--?(?:[\w-]+-)?(?:api-key|password|token|secret)$", re.IGNORECASE)
"""An option of a command line whose value is the next text of a list."""
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|dapi[0-9a-f]{32}|pn[ub]_[A-Za-z0-9]{20,}|xox[abprs]-[\w-]{10,}"
    r"|nvapi-[\w-]{16,}|(?:gsk|r8)_[A-Za-z0-9]{20,}|xai-[A-Za-z0-9]{20,}|AIza[\w-]{30,}|ya29\.[\w-]{16,}"
    r"|pypi-[\w-]{30,}|eyJ[\w-]{8,}\.eyJ[\w-]{4,}\.[\w-]*)"  # the last: a JSON web token
)
"""Keys and tokens that their issuers mark by a prefix."""
_NAMED = re.compile(_KEY_NAME, re.IGNORECASE)
_SCHEMELESS = re.compile(r"([^\s:/@]+:[^\s/@]+)@[\w.-]+")

_remembered: set[str] = set()


def hide(text: str) -> str:
    """Replace every secret in a text by ***."""
    values = _values(tuple(os.environ.items()), frozenset(_remembered))
    text = values.whole.sub(HIDDEN, text) if values.whole else text
    for shape, instead in _SHAPES:
        text = shape.sub(instead, text)
    return _without_start(_KNOWN.sub(HIDDEN, text), values.raw)


def holds_secret(text: str) -> bool:
    """Return whether a text holds a secret, whole."""
    values = _values(tuple(os.environ.items()), frozenset(_remembered))
    found = [_KNOWN, _OPTION, *(shape for shape, _ in _SHAPES), *([values.whole] if values.whole else [])]
    return any(shape.search(text) for shape in found)


def pattern() -> str:
    """Return the forms that `holds_secret` knows as one expression without flags, for a JSON schema.

    A schema knows nothing of the environment, so its secret values are not in it.
    """

    def any_case(part: re.Match[str]) -> str:
        text = part[0]
        if text.startswith("["):
            return text.replace("a-z", "a-zA-Z")
        return f"[{text.lower()}{text.upper()}]" if text.isalpha() else text

    shapes = [
        re.sub(r"\\.|\[(?:\\.|[^\]])*\]|.", any_case, shape.pattern)
        for shape in (_OPTION, *(each for each, _ in _SHAPES))
    ]
    return "|".join(f"(?:{each})" for each in [_KNOWN.pattern, *shapes]).replace('\\"', '"')


def hide_in(record: Any) -> Any:
    """Replace secrets in every text of a JSON-like value, and texts that a key or an option before them names as one.

    The keys of mappings stay.
    """
    if isinstance(record, str):
        return hide(record)
    if isinstance(record, Mapping):
        return {key: HIDDEN if _is_named(key, value) else hide_in(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        before = [None, *record]
        return [HIDDEN if _is_value_of(*pair) else hide_in(pair[1]) for pair in zip(before, record, strict=False)]
    return record


def _is_value_of(option: Any, value: Any) -> bool:
    return isinstance(option, str) and isinstance(value, str) and _OPTION.match(option) is not None


def _is_named(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and value != "" and _NAMED.fullmatch(key) is not None


def remember(*values: str) -> None:
    """Hide further values from now on, such as a password made at the start of a server."""
    _remembered.update(filter(None, values))


def install() -> None:
    """Hide secrets in all that this process prints and logs, libraries and tracebacks included; see `_HidingStream`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _HidingStream):
            setattr(sys, name, _HidingStream(stream))
    make = logging.getLogRecordFactory()
    if not isinstance(make, _HidingRecords):
        logging.setLogRecordFactory(_HidingRecords(make))


class _HidingStream:
    """A text stream that hides secrets in what is written to it, and shows control characters as symbols.

    In all else it is the stream it wraps.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(harmless(hide(text), self._stream.isatty()))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _HidingRecords:
    """Makes log records without secrets: handlers that send them elsewhere never see any."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *arguments: Any, **named: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make(*arguments, **named)
        try:
            message = record.getMessage()
        except Exception:  # wrong arguments: logging reports them
            return record
        hidden = hide(message)
        if hidden != message:  # else handlers that read the arguments find them as they were
            record.msg, record.args = hidden, ()
        if record.exc_info and record.exc_info[0]:
            text = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            if (hidden := hide(text)) != text:
                record.exc_info, record.exc_text = None, hidden
        return record


class _Values:
    """Secret values: one expression that finds them in every form, and their raw texts."""

    def __init__(self, raw: set[str]) -> None:
        self.raw = sorted(raw, key=len, reverse=True)
        forms = {form for value in raw for form in _forms(value)}
        longest_first = sorted(forms, key=lambda form: (-len(form), form))
        self.whole = re.compile("|".join(map(re.escape, longest_first))) if forms else None


@lru_cache(maxsize=8)
def _values(environment: tuple[tuple[str, str], ...], further: frozenset[str]) -> _Values:
    """Collect the secret values of an environment."""
    found = set(further)
    users = []
    for name, value in environment:
        if _SECRET_NAME.search(name) and not _NOT_SECRET_NAME.search(name):
            found |= {value, *value.split("\n")}
            if ":" in value and re.search("AUTH|CREDENTIAL", name, re.I):  # user:password
                found.add(value.partition(":")[2])
        elif _USER_NAME.match(name):
            users.append(value)
        for userinfo in _userinfos(name, value):
            user, colon, password = userinfo.partition(":")
            for part in {userinfo, unquote(userinfo), *([password, unquote(password)] if colon else [])}:
                found.add(part)
            if not user.isalpha():  # `admin` and `mlflow` stand in any text for something else
                found |= {user, unquote(user)}
    found = {value.strip() for value in found}
    found = {value for value in found if _is_telling(value)}
    # What HTTP clients make of a user name and a password.
    pairs = {f"{user}:{value}" for user in users for value in found if user}
    return _Values(found | pairs)


def _userinfos(name: str, value: str) -> Iterator[str]:
    """Find `user:password` in the URLs of a variable, which may have commas between several."""
    for url in re.split(r"\s+|,(?=[a-z][a-z0-9+.-]*://)", value, flags=re.I):
        rest = url.partition("://")[2]
        place = re.split(r"[/?#]", rest, maxsplit=1)[0]
        if "@" not in place and ":" in place and not place.rpartition(":")[2].isdigit():
            place = rest  # a password with a slash, which should have been %2F
        if "@" in place:
            yield place.rpartition("@")[0]
    if "://" not in value and re.search(r"(URL|URI|PROXY)$", name, re.I):
        yield from _SCHEMELESS.findall(value)


def _is_telling(value: str) -> bool:
    is_word = value.isalpha() or value.isdigit()
    return len(value) >= (_SHORTEST_WORD if is_word else _SHORTEST)


def _forms(value: str) -> set[str]:
    """Write a value in the ways in which text repeats it."""
    escaped = [quote(value, errors="surrogateescape", safe=safe) for safe in ("/", "")]
    forms = {value, *escaped, escaped[1].lower(), escaped[1].replace("%20", "+"), " ".join(value.split())}
    forms |= {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]}
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        encoded = encode(value.encode(errors="surrogateescape")).decode()
        forms |= {encoded, encoded.rstrip("=")}
    return {form for form in forms if form}


def _without_start(text: str, values: Iterable[str]) -> str:
    """Remove the first half of a secret from the end of a text that was cut inside it."""
    for value in values:
        least = max(_SHORTEST, min(len(value) - 1, _SHORTEST_START))
        if value[:least] not in text[-len(value) :]:
            continue
        for size in range(len(value) - 1, least - 1, -1):
            if text.endswith(value[:size]):
                return text[:-size] + HIDDEN
    return text
