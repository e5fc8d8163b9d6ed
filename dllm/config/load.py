"""Read params.yaml, apply overrides, check every value, and digest sections."""

from __future__ import annotations

import difflib
import hashlib
import json
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dllm.config.params import Params
from dllm.errors import ConfigError

Model = typing.TypeVar("Model", bound=BaseModel)


def load_params(path: Path | str = "params.yaml", overrides: typing.Sequence[str] = ()) -> Params:
    """Read params.yaml, apply `a.b.c=value` overrides (values are YAML), and check the result.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong type, or values conflict.
    """
    path = Path(path)
    try:
        raw = read_yaml(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            "no params file",
            where=str(path),
            hint="run `python -m dllm recipe use NAME` or go to the project's folder",
        ) from None
    except ValueError as error:
        raise ConfigError(f"not YAML: {error}", where=str(path)) from None
    if not isinstance(raw, dict):
        raise ConfigError("params must be a mapping of sections", where=str(path))
    for override in overrides:
        _override(raw, override)
    return parse_params(raw, where=str(path))


def parse_params(raw: dict[str, Any], where: str = "params.yaml") -> Params:
    """Check a mapping as params; see `load_params`."""
    return parse_as(Params, raw, where)


def parse_as(model: type[Model], raw: dict[str, Any], where: str) -> Model:
    """Check a mapping as some sections of params.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type, or values clash.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(_explain(first), where=where) from None


def read_yaml(text: str) -> Any:
    """Read one YAML 1.2 document; values are those that DVC, which uses the same library, reads from params.yaml.

    Raises:
        ValueError: the text is not YAML, or a mapping has a key twice. The message is one line.
    """
    try:
        # Pure Python: the C parser, which is not installed everywhere, refuses [http://host:80/v1] without quotes.
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ValueError(_one_line(error)) from None


def params_digest(*sections: BaseModel) -> str:
    """Hash sections into 16 hex digits that depend on their values only.

    Keys whose value is None are left out: a new key with default None changes no digest.
    """
    text = json.dumps([s.model_dump(mode="json", by_alias=True, exclude_none=True) for s in sections], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    node: Any = raw
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {parent} holds no keys", where="--set")
    try:
        node[last] = read_yaml(value)
    except ValueError:
        raise ConfigError(f"{key}: {value!r} is not a YAML value", where="--set") from None


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
        return f"{path}: {message}, got {given!r}"
    return f"{path}: {message}" if path else message


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    model: Any = Params
    for part in loc:
        if isinstance(part, int):
            continue
        fields = {f.alias or name: f for name, f in model.model_fields.items()}
        model = fields[part].annotation
        args = typing.get_args(model)
        model = next((a for a in (*args, model) if isinstance(a, type) and issubclass(a, BaseModel)), model)
    return [f.alias or name for name, f in model.model_fields.items()]
