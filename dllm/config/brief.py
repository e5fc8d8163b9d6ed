"""Values of params.yaml in a few characters, for the names of runs.

Of a list the entries' names are shown, with what else they set. Whatever is cut ends in four digits of its hash, so
that values which differ are written differently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

VALUE_CHARS = 40
SHOWN = 3
"""Values in the name of a run."""


def brief(value: Any, chars: int = VALUE_CHARS) -> str:
    """Write a value in at most so many characters."""
    text = _text(value)
    if len(text) <= chars:
        return text
    mark = _hash(value)
    return f"{text[: chars - len(mark)]}{mark}"


def brief_pairs(values: Mapping[str, Any]) -> list[str]:
    """Write the first SHOWN values as `key=value`, under the last part of a key where no other ends so."""
    ends = [key.rpartition(".")[2] for key in values]
    short = [end if ends.count(end) == 1 else key for key, end in zip(values, ends, strict=True)]
    pairs = [f"{key}={brief(value)}" for key, value in zip(short, values.values(), strict=True)]
    rest = pairs[SHOWN:]
    return [*pairs[:SHOWN], f"+{len(rest)} more{_hash(rest)}"] if rest else pairs


def _hash(value: Any) -> str:
    return f"~{hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:4]}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return _entry({key: each for key, each in value.items() if each is not None})
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "+".join(map(_text, value)) or "none"
    return json.dumps(value) if isinstance(value, bool) or value is None else " ".join(str(value).split())


def _entry(entry: Mapping[str, Any]) -> str:
    """Write a mapping by its name, of a path the last part, and by its other values."""
    named = [str(entry["name"]).rstrip("/").rpartition("/")[2]] if "name" in entry else []
    own = [f"{key}={_text(each)}" for key, each in entry.items() if key != "name"]
    return "".join([*named, *([f"({','.join(own)})"] if own else [])])
