"""Recipes become params.yaml whole, and never over somebody's edits."""

from pathlib import Path

import pytest

from dllm.config import recipe_book
from dllm.errors import ConfigError
from tests.arch.source_tree import ROOT


def test_a_recipe_replaces_another_one(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    for name in ("tiny-dflash", "smollm2-135m-dflash"):
        recipe_book.activate(name, path)
        assert path.read_text() == recipe_book.text(name)
    assert [file.name for file in tmp_path.iterdir()] == ["params.yaml"]


def test_edits_by_hand_are_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    edited = recipe_book.text("tiny-dflash").replace("epochs: 2", "epochs: 3")
    path.write_text(edited)
    with pytest.raises(ConfigError, match="edited by hand"):
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


def test_the_projects_params_are_a_recipe_as_shipped() -> None:
    shipped = {recipe_book.text(name) for name in recipe_book.names()}
    assert (ROOT / "params.yaml").read_text() in shipped
