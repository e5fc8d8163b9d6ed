"""Read params.yaml, apply overrides, check every value, and digest sections."""

from __future__ import annotations

import difflib
import hashlib
import json
import typing
import unicodedata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dllm.config.params import Params
from dllm.disk_faults import what_helps
from dllm.errors import ConfigError
from dllm.secrets import holds_secret

Model = typing.TypeVar("Model", bound=BaseModel)

MAX_BYTES = 1_000_000
"""Largest params.yaml that is read."""
MAX_TEXT = 4096
"""Longest text in params.yaml, in characters."""
MAX_KEY = 100
MAX_DEPTH = 10
MAX_VALUES = 10_000
_UNSEEN = {"Cc", "Cs", "Zl", "Zp"}  # control characters, lone surrogates, line and paragraph separators
_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # they reorder the text around them


def load_params(path: Path | str = "params.yaml", overrides: typing.Sequence[str] = ()) -> Params:
    """Read params.yaml, apply `a.b.c=value` overrides (values are YAML), and check the result.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong type, or values conflict.
    """
    path = Path(path)
    raw = _read_file(path)
    if not isinstance(raw, dict):
        raise ConfigError("params must be a mapping of sections", where=str(path))
    return parse_params(raw, where=str(path), overrides=overrides)


def parse_params(raw: dict[str, Any], where: str = "params.yaml", overrides: typing.Sequence[str] = ()) -> Params:
    """Apply overrides to a mapping, and check it as params; see `load_params`."""
    for override in overrides:
        _override(raw, override)
    return parse_as(Params, raw, where)


def parse_as(model: type[Model], raw: dict[str, Any], where: str) -> Model:
    """Check a mapping as some sections of params.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type, or values clash.
    """
    _check_values(raw, "", where)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(_explain(first), where=where) from None


def read_yaml(text: str) -> Any:
    """Read one YAML 1.2 document; values are those that DVC, which uses the same library, reads from params.yaml.

    Raises:
        ValueError: the text is not YAML 1.2, a mapping has a key twice, or a value does not fit its tag. The message is
            one line.
    """
    if any(line.startswith("%") for line in text.splitlines()):
        # With %YAML 1.1 the library's two parsers read `yes`, `010` and `1:30` differently.
        raise ValueError("a line begins with %; directives are not supported, and YAML 1.2 needs none")
    try:
        # Pure Python: the C parser is not installed everywhere, and overflows the stack on deep nesting.
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ValueError(_one_line(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
        # Raised by the library itself: !!int abc, !!bool maybe, 5,000 digits.
        raise ValueError(f"a value cannot be read: {' '.join(str(error).split())}") from None


def params_digest(*sections: BaseModel) -> str:
    """Hash sections into 16 hex digits that depend on their values only.

    Keys whose value is None are left out: a new key with default None changes no digest.
    """
    text = json.dumps([s.model_dump(mode="json", by_alias=True, exclude_none=True) for s in sections], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_file(path: Path) -> Any:
    """Read a YAML file that both parsers of the library, ours and DVC's, read as the same values."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode()
    except FileNotFoundError:
        raise ConfigError(
            "no params file",
            where=str(path),
            hint="run `python -m dllm recipe use NAME` or go to the project's folder",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}", where=str(path)) from None
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror or error}", where=str(path), hint=what_helps(error)
        ) from None
    except ValueError as error:  # the path has a null byte
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES // 1000} kB, so it is no params file", where=str(path))
    try:
        raw = read_yaml(text)
    except ValueError as error:
        if (line := _conflict_line(text)) is not None:
            what, hint = f"a merge left both sides of a conflict in it, line {line}", "keep one of them, then run again"
            raise ConfigError(what, where=str(path), hint=hint) from None
        raise ConfigError(f"not YAML: {error}", where=str(path)) from None
    _check_values(raw, "", str(path))
    try:
        as_dvc_reads_it = YAML(typ="safe").load(text)
    except YAMLError as error:
        hint = "put texts with a colon, brackets or braces in quotes"
        raise ConfigError(f"DVC cannot read it: {_one_line(error)}", where=str(path), hint=hint) from None
    if repr(as_dvc_reads_it) != repr(raw):  # as text, since NaN differs from itself
        raise ConfigError("DVC reads other values from it", where=str(path), hint="write it without tags and anchors")
    return raw


def _conflict_line(text: str) -> int | None:
    """Return the number of the first line that git has written between two sides of a conflict."""
    marks = ("<<<<<<< ", ">>>>>>> ")
    return next((number for number, line in enumerate(text.splitlines(), 1) if line.startswith(marks)), None)


def _check_values(raw: Any, path: str, where: str) -> int:
    """Refuse values that no run can have, and return how many there are.

    Such are texts with control characters or thousands of characters, giant integers, and endless nesting (an alias of
    YAML can stand inside what it names, or multiply).
    """
    count = 1
    if isinstance(raw, (dict, list, tuple)):
        if path.count(".") > MAX_DEPTH:
            raise ConfigError(f"{path[:40]}...: nested more than {MAX_DEPTH} levels deep", where=where)
        for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
            if isinstance(raw, dict):
                if not isinstance(key, str):
                    raise ConfigError(f"{path or 'params'}: a key that is not a text, {_shown(key)}", where=where)
                _check_text(key, f"a key of {path or 'params'}", MAX_KEY, where)
            count += _check_values(value, f"{path}.{key}" if path else str(key), where)
            if count > MAX_VALUES:
                raise ConfigError(f"{path[:200] or 'params'}: more than {MAX_VALUES} values", where=where)
    elif isinstance(raw, int) and abs(raw) >= 2**64:
        raise ConfigError(f"{path}: an integer of {raw.bit_length()} bits; at most 64 are allowed", where=where)
    elif isinstance(raw, str):
        _check_text(raw, path, MAX_TEXT, where)
        if holds_secret(raw):
            what = f"{path}: it holds a secret, and parameters are written to files that are committed"
            raise ConfigError(what, where=where, hint=_secret_hint(path))
    return count


def _secret_hint(path: str) -> str:
    """Say which environment variable takes a secret instead of a parameter."""
    if path.startswith("regenerate.sglang"):
        return "leave it out: the server listens on loopback only"
    if path.startswith("regenerate"):
        return "leave it out, and set OPENAI_API_KEY, or DLLM_TARGET_URL to the address with user and password"
    if path.startswith(("target", "prepare")):
        return "leave it out, and set HF_TOKEN for what needs a login on the Hugging Face hub"
    return "leave it out, and set MLFLOW_TRACKING_USERNAME and _PASSWORD, or the variable of the library that needs it"


def _check_text(text: str, path: str, longest: int, where: str) -> None:
    bad = next((c for c in text if unicodedata.category(c) in _UNSEEN or unicodedata.bidirectional(c) in _BIDI), None)
    if bad is not None:
        raise ConfigError(f"{path}: the text has the control character U+{ord(bad):04X}", where=where)
    if len(text) > longest:
        raise ConfigError(f"{path}: a text of {len(text)} characters; at most {longest} are allowed", where=where)


def _one_line(error: YAMLError) -> str:
    if not isinstance(error, MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    what = " ".join(str(error.problem or error.context).split())
    return what if mark is None else f"{what}, line {mark.line + 1}, column {mark.column + 1}"


def _override(raw: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"an override reads KEY=VALUE, got {text!r}", where="--set")
    *parents, last = key.split(".")
    if not all((*parents, last)):
        raise ConfigError(f"an override reads KEY=VALUE with a key such as train.epochs, got {text!r}", where="--set")
    node: Any = raw
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {parent} holds no keys", where="--set")
    try:
        node[last] = read_yaml(value)
    except ValueError as error:
        raise ConfigError(f"{key}: {_shown(value)} is not a YAML value: {error}", where="--set") from None


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _known_keys(error["loc"][:-1]), n=1, cutoff=0.5)
        return f"{path}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"{path}: missing"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    if isinstance(given, (str, int, float, bool)) or given is None:
        if error["type"] == "literal_error":
            options = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            near = difflib.get_close_matches(str(given), options, n=1, cutoff=0.4)
            message += f"; did you mean {near[0]}?" if near else ""
        if error["type"] == "string_type" and given is not None:  # YAML reads 12e4567 as a number, and on as a truth
            message += "; put it in quotes"
        return f"{path}: {message}, got {_shown(given)}"
    return f"{path}: {message}" if path else message


def _shown(value: Any) -> str:
    """Write a value as Python does, cut to a length that leaves room for the rest of the line."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    model: Any = Params
    for part in loc:
        if isinstance(part, int):
            continue
        fields = {f.alias or name: f for name, f in model.model_fields.items()}
        model = _section_in(fields[part].annotation)
    return [f.alias or name for name, f in model.model_fields.items()]


def _section_in(annotation: Any) -> Any:
    """Return the section that an annotation holds, alone, in a list or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _section_in(part)) is not None), None)
