"""Recipes state what differs from the defaults, become params.yaml whole, and never replace somebody's values."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.serialize import parse_yaml
from pydantic import BaseModel

from dllm.config import recipe_book
from dllm.config.load import load_params, parse_params, read_yaml
from dllm.config.params import Params
from dllm.errors import ConfigError
from dllm.registry import METHODS
from tests.arch.source_tree import ROOT

KeyPath = tuple[str | int, ...]


def _keys(node: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """List the paths to all keys of a mapping, those inside lists too."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if isinstance(key, str):
            yield (*at, key)
        yield from _keys(value, (*at, key))


def _without(raw: Any, path: KeyPath) -> Any:
    raw = copy.deepcopy(raw)
    node = raw
    for part in path[:-1]:
        node = node[part]
    del node[path[-1]]
    return raw


def _missing(model: BaseModel, raw: dict[str, Any], at: str = "") -> Iterator[str]:
    """List the fields without a key."""
    for name, field in type(model).model_fields.items():
        key, value = field.alias or name, getattr(model, name)
        if key not in raw:
            yield at + key
            continue
        values, written = (value, raw[key]) if isinstance(value, list) else ([value], [raw[key]])
        for each, mapping in zip(values, written, strict=True):
            if isinstance(each, BaseModel):
                yield from _missing(each, mapping, f"{at}{key}.")


@pytest.mark.parametrize("name", recipe_book.names())
def test_a_recipe_states_nothing_that_equals_its_default(name: str) -> None:
    raw, params = read_yaml(recipe_book.source(name)), recipe_book.load(name)
    assert params.recipe == name == params.register_.model_name
    for path in _keys(raw):
        try:
            same = parse_params(_without(raw, path)) == params
        except ConfigError:  # a required key
            continue
        assert not same, f"{'.'.join(map(str, path))} is the default"


@pytest.mark.parametrize("name", recipe_book.names())
def test_a_recipe_is_written_whole(name: str, tmp_path: Path) -> None:
    recipe_book.activate(name, tmp_path / "params.yaml")
    text = (tmp_path / "params.yaml").read_text()
    params = load_params(tmp_path / "params.yaml")
    assert params == recipe_book.load(name)
    raw = read_yaml(text)
    assert list(raw) == [field.alias or key for key, field in Params.model_fields.items()]
    assert parse_yaml(text, "params.yaml") == yaml.safe_load(text) == raw, "no parser reads it in another way"
    modes = {"dflash", "mdlm", "hybrid"}
    missing = set(_missing(params, raw))
    added = {f"evaluate.{section}" for _, method in METHODS.items() for section in method.evaluation}
    optional = {f"train.{params.train.mode}.lora", "train.dflash.draft.dflash2"} | added
    assert missing <= {f"train.{mode}" for mode in modes} | optional
    assert modes & set(raw["train"]) == {params.train.mode}, "sections of other modes are left out"
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in recipe_book.source(name).splitlines() if line.startswith("#")
    ]


def test_a_recipe_replaces_another_one(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    for name in ("tiny-dflash", "smollm2-135m-dflash"):
        recipe_book.activate(name, path)
        assert path.read_text() == recipe_book.text(name)
    assert [file.name for file in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize(
    "written", [recipe_book.source, lambda name: yaml.safe_dump(read_yaml(recipe_book.text(name)))]
)
def test_a_file_with_the_values_of_a_recipe_is_replaced_however_it_is_written(written: Any, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(written("tiny-mdlm"))
    recipe_book.activate("tiny-dflash", path)
    assert path.read_text() == recipe_book.text("tiny-dflash")


@pytest.mark.parametrize(
    ("old", "new"), [("epochs: 2.0", "epochs: 3.0"), ("epochs: 2.0", "epoch: 2.0"), ("recipe: tiny", "recipe: my")]
)
def test_edits_by_hand_are_kept_unless_forced(old: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    edited = recipe_book.text("tiny-dflash").replace(old, new)
    assert edited != recipe_book.text("tiny-dflash")
    path.write_text(edited)
    with pytest.raises(ConfigError, match="its values are those of no recipe"):
        recipe_book.activate("tiny-dflash", path)
    assert path.read_text() == edited
    recipe_book.activate("tiny-dflash", path, force=True)
    assert path.read_text() == recipe_book.text("tiny-dflash")


def test_an_unknown_recipe_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean tiny-dflash"):
        recipe_book.activate("tiny-dflsh", tmp_path / "params.yaml")
    assert not list(tmp_path.iterdir())


def test_every_recipe_sums_itself_up() -> None:
    for name, summary in recipe_book.summaries().items():
        assert summary.endswith("."), name
        assert ":" not in summary.split()[0], f"{name}: its first line is no comment"


def test_the_projects_params_are_the_default_recipe() -> None:
    text = (ROOT / "params.yaml").read_text()
    assert text == recipe_book.text("smollm2-135m-dflash2"), "run `python -m dllm recipe use smollm2-135m-dflash2`"


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_in_place_of_params_is_named(tmp_path: Path, force: bool) -> None:
    (tmp_path / "params.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"no file stands there.*move it away"):
        recipe_book.activate("tiny-dflash", tmp_path / "params.yaml", force=force)
