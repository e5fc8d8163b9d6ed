"""The shipped recipes, and how one becomes params.yaml.

A recipe states only the values that differ from the defaults. params.yaml is written with every key, so that it shows
each value that a run depends on.
"""

from __future__ import annotations

import difflib
import io
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode, SequenceNode
from ruamel.yaml.representer import RoundTripRepresenter

from dllm.config.load import load_params, parse_params, read_yaml
from dllm.config.params import Params
from dllm.errors import ConfigError
from dllm.files import atomic_write

FOLDER = Path(__file__).parent / "recipes"
"""Folder of the recipes: one NAME.yaml each, whose first line is a comment with its summary."""


def names() -> list[str]:
    """List the recipes by name."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def summaries() -> dict[str, str]:
    """Map each recipe to the sentence in its first line."""
    return {name: source(name).splitlines()[0].lstrip("# ") for name in names()}


def source(name: str) -> str:
    """Read a recipe file as it is shipped: its comments and what differs from the defaults.

    Raises:
        ConfigError: no recipe has that name.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "`python -m dllm recipe list` names them"
        raise ConfigError(f"no recipe {name!r}", where="dllm/config/recipes", hint=hint)
    return (FOLDER / f"{name}.yaml").read_text()


def load(name: str, overrides: typing.Sequence[str] = ()) -> Params:
    """Load a recipe, with defaults for what it does not state.

    Args:
        name: the recipe.
        overrides: `a.b.c=value`, as for `load_params`.

    Raises:
        ConfigError: no recipe has that name, or an override is wrong.
    """
    return parse_params(read_yaml(source(name)), where=f"{name}.yaml", overrides=overrides)


def text(name: str) -> str:
    """Write a recipe as a whole params.yaml: its comments, then every key; raises as `source` does."""
    return text_of(load(name), [line for line in source(name).splitlines() if line.startswith("#")])


def text_of(params: Params, comments: typing.Sequence[str]) -> str:
    """Write params as a whole params.yaml: lines of comment, then every key."""
    first, *rest = [_dump({key: value}) for key, value in every_key(params).items()]
    return "\n".join(["".join(f"{line}\n" for line in comments) + first, *rest])


def every_key(model: BaseModel) -> dict[str, Any]:
    """Map every key to its value, in the order of the fields; an optional section that is absent is left out."""
    dumped = model.model_dump(mode="json", by_alias=True)
    whole = {}
    for name, field in type(model).model_fields.items():
        key, value = field.alias or name, getattr(model, name)
        if key not in dumped or (value is None and _may_be_section(field.annotation)):
            continue
        whole[key] = _nested(value, dumped[key])
    return whole


def activate(name: str, path: Path, *, force: bool = False) -> None:
    """Write a recipe to `path` as a whole params.yaml, atomically.

    Raises:
        ConfigError: no recipe has that name, or the values in the file at `path` are those of no recipe and `force` is
            not given.
    """
    content = text(name)
    if not force:
        check_nothing_lost(path, "keep a copy and give --force to overwrite it")
    write(path, content)


def check_nothing_lost(path: Path, hint: str) -> None:
    """Refuse to overwrite a params.yaml that has values of its own.

    Raises:
        ConfigError: its values are those of no recipe.
    """
    if path.is_file() and not _is_recipe(path):
        raise ConfigError("its values are those of no recipe", where=str(path), hint=hint)


def write(path: Path, content: str) -> None:
    """Write a params.yaml, atomically.

    Raises:
        ConfigError: there is no such folder, or no file stands at the path.
    """
    if path.exists() and not path.is_file():
        raise ConfigError("no file stands there", where=str(path), hint="remove it or move it away")
    if not path.parent.is_dir():
        raise ConfigError("no such folder", where=str(path.parent))
    atomic_write(path, content.encode())


def _is_recipe(path: Path) -> bool:
    """Say whether overwriting the file loses no value: it has exactly those of the recipe that it names."""
    try:
        params = load_params(path)
    except ConfigError:
        return False
    return params.recipe in names() and params == load(params.recipe)


def _may_be_section(annotation: Any) -> bool:
    parts = [annotation, *typing.get_args(annotation)]
    return any(isinstance(part, type) and issubclass(part, BaseModel) for part in parts)


def _nested(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        return every_key(value)
    if isinstance(value, list):
        return [_nested(one, one_dumped) for one, one_dumped in zip(value, dumped, strict=True)]
    return dumped


class _Representer(RoundTripRepresenter):
    """Writes null for None, lists of plain values in one line, and floats that YAML 1.1 reads as floats too."""

    def represent_float(self, data: float) -> ScalarNode:
        value = repr(data)
        return self.represent_scalar("tag:yaml.org,2002:float", value if "." in value else value.replace("e", ".0e"))

    def represent_none(self, data: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")

    def represent_list(self, data: list[Any]) -> SequenceNode:
        # DVC's parser refuses a plain scalar with a colon inside [ ].
        is_plain = not any(isinstance(each, (dict, list)) or ":" in str(each) for each in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=is_plain)


_Representer.add_representer(type(None), _Representer.represent_none)
_Representer.add_representer(float, _Representer.represent_float)
_Representer.add_representer(list, _Representer.represent_list)


def _dump(raw: dict[str, Any]) -> str:
    writer = YAML()
    writer.Representer = _Representer
    writer.width = 120
    writer.indent(mapping=2, sequence=4, offset=2)
    stream = io.StringIO()
    writer.dump(raw, stream)
    return stream.getvalue()
