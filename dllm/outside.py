"""Text from outside the project: parsed strictly, and printed so that it cannot act on a terminal or a page.

Rows, manifests, replies and names of files are data. A parser either returns plain values or raises a ValueError of one
line; a line that is printed holds no control characters.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 100
"""Nesting of JSON that is read. Deeper values exhaust the stack of whoever handles them later."""
MAX_LINE = 500
"""Characters in a line of an error."""

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_HIDDEN = (
    *range(0x80, 0xA0),  # C1: U+009B begins a terminal's commands as ESC [ does
    *(0x061C, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF),  # marks, line separators
    *range(0x202A, 0x202F),  # bidi embeddings and overrides
    *range(0x2060, 0x2070),  # bidi isolates, invisible operators
    *range(0xFFF9, 0xFFFC),
    *range(0xE0000, 0xE0080),  # tags
)
_VISIBLE = _PICTURES | {code: f"<U+{code:04X}>" for code in _HIDDEN}
_SURROGATE = re.compile("[\ud800-\udfff]")
_RETURN = re.compile("(\r)")
_STYLE = re.compile("(\r|\x1b\\[[0-9;?]*[A-Za-z])")
"""Commands of a bar or a table: colours, lines erased, the cursor moved. None sets a title or fills a clipboard."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]!|~$])")


class JsonError(ValueError):
    """A text that is not JSON, or JSON that is not read; the message is one line, made to follow "not JSON: "."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line
        """1-based line of the text."""


def parse_json(text: str | bytes, *, is_row: bool = False) -> Any:
    """Parse JSON that others wrote.

    Args:
        is_row: refuse a key that stands twice in an object, of which one value would be lost.

    Raises:
        JsonError: it is not JSON, holds a number that JSON has not (NaN) or one of thousands of digits, or is nested
            deeper than MAX_DEPTH.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique if is_row else None)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise JsonError(f"{error.msg} at {line}column {error.colno}", error.lineno) from None
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except RecursionError:
        raise JsonError(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise JsonError("a number of thousands of digits" if "digits" in str(error) else str(error)) from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value


def is_text(value: str) -> bool:
    """Return whether a string is text: an unpaired surrogate, which JSON can spell, is not."""
    return _SURROGATE.search(value) is None


def is_file_name(value: Any) -> bool:
    """Return whether a value names a file in a folder, and none outside it."""
    is_plain = isinstance(value, str) and is_text(value) and not {"/", "\\", "\0"} & set(value)
    return is_plain and value not in ("", ".", "..") and len(value.encode()) <= 255


def visible(text: str) -> str:
    """Show control characters, bidi marks and other invisible characters as symbols; line breaks and tabs stay."""
    return _SURROGATE.sub("\ufffd", text.translate(_VISIBLE))


def harmless(text: str, is_terminal: bool) -> str:
    """Make printed text harmless as `visible` does, but for returns of the carriage and, on a terminal, styles.

    The last door: progress bars and tables write such commands themselves, so those in a text are not told apart.
    """
    if text.isprintable():
        return text
    kept = _STYLE if is_terminal else _RETURN
    return "".join(part if kept.fullmatch(part) else visible(part) for part in kept.split(text))


def one_line(text: str, limit: int | None = None) -> str:
    """Make a text one visible line, cut in its middle where it is longer than `limit` characters."""
    line = visible(" ".join(text.split()))
    if limit is None or len(line) <= limit:
        return line
    head = (limit - 5) * 3 // 5
    return f"{line[:head]} ... {line[head + 5 - limit :]}"


def markdown(text: str) -> str:
    """Escape a text for a line or a table cell of Markdown: no markup, no HTML, no link."""
    escaped = _MARKDOWN.sub(r"\\\1", one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:40]!r} stands twice")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise JsonError(f"nested deeper than {MAX_DEPTH} levels")


def tls_hint(cause: str, variable: str) -> str | None:
    """Return what helps where TLS itself fails; None where it does not.

    Args:
        cause: what OpenSSL says, somewhere in it.
        variable: the environment variable that names a file of authorities.
    """
    low = cause.lower().replace("_", " ")
    if "wrong version number" in low or "record layer failure" in low:
        return "the server speaks http: write http:// instead of https://"
    if "certificate" in low:
        return f"set {variable} to the file of the authority that signed it"
    return None
