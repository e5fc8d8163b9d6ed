"""params.yaml read, overridden and checked; digests of its sections."""

from __future__ import annotations

import difflib
import hashlib
import json
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dllm.config import yaml_reader
from dllm.config.params import Params
from dllm.errors import ConfigError

Model = typing.TypeVar("Model", bound=BaseModel)

GUIDE_NAMES = {
    "overlap_anchors": "anchor_sampling: with_replacement (true) or non_overlapping (false)",
    "attention_backend": "nothing: attention is exact and sparse on every device",
    "target_model_id": "target.model",
    "target_torch_dtype": "target.dtype",
    "unshifted": "nothing: data are never shifted",
    "supervise_padding": "eos_padding",
    "pad_seq_len_divisible": "eos_padding",
    "use_fused_linear_ce": "nothing: the cross-entropy is always chunked; ce_chunk_size sets how",
}
"""Fields of NeMo AutoModel's guide that have another name here, and that name."""


def load_params(path: Path | str = "params.yaml", overrides: typing.Sequence[str] = ()) -> Params:
    """Read params.yaml, apply `a.b.c=value` overrides (values are YAML), and check all of it.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong type, or values clash.
    """
    path = Path(path)
    try:
        raw = yaml_reader.read(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            "no params file", where=str(path), hint="run `python -m dllm recipe use NAME` or go to the project's folder"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}", where=str(path)) from None
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


def params_digest(*sections: BaseModel) -> str:
    """Hash sections into 16 hex digits that change exactly when a value does."""
    text = json.dumps([s.model_dump(mode="json", by_alias=True) for s in sections], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
        node[last] = yaml_reader.read(value)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {value!r} is not a YAML value", where="--set") from None


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        name = str(error["loc"][-1])
        if name in GUIDE_NAMES:
            return f"{path}: not a key here; use {GUIDE_NAMES[name]}"
        near = difflib.get_close_matches(name, _known_keys(error["loc"][:-1]), n=1, cutoff=0.5)
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
