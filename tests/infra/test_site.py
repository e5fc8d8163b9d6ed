"""What pages of the docs site promise: error texts and keys that the code has, and a menu with every page."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from dllm.config.load import load_params
from tests.arch.source_tree import ROOT, python_files, tree

DOCS = ROOT / "docs"
GENERATED = {"reference/cli.md", "reference/python.md"}


@cache
def _texts() -> str:
    """Join every string of the code, parts of f-strings included."""
    nodes = [node for path in python_files("dllm", "flows", "infra") for node in ast.walk(tree(path))]
    strings = [str(node.value) for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(strings)


def _errors() -> list[str]:
    headings = re.findall(r"^### (`+)(.+?)\1$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    return [text for _, text in headings]


@pytest.mark.parametrize("error", _errors())
def test_every_error_of_the_troubleshooting_page_is_the_codes(error: str) -> None:
    parts = [part.strip(" ;:?") for part in error.split("…")]
    assert any(len(part) > 9 for part in parts), "too short to find"
    assert [part for part in parts if part and part not in _texts()] == []


def test_the_troubleshooting_page_has_errors_of_each_kind() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    assert len(_errors()) > 15
    assert {f"exit code {code}" for code in range(2, 7)} <= set(re.findall(r"exit code \d", text))


def _keys(page: str) -> list[str]:
    cells = [row.split("|")[2] for row in (DOCS / "from" / page).read_text().splitlines() if row.startswith("|")]
    return [key for cell in cells for key in re.findall(r"`((?:target|prepare|regenerate|train)\.[\w.]+)", cell)]


@pytest.mark.parametrize("page", ["automodel.md", "specforge.md"])
def test_every_option_of_another_trainer_leads_to_a_key_that_exists(page: str) -> None:
    keys = _keys(page)
    assert len(keys) > 12
    params: Any = load_params(ROOT / "params.yaml", [])
    for key in keys:
        node = params
        for part in key.split("."):
            assert hasattr(node, part), f"{page}: {key}"
            node = getattr(node, part)


def _menu(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    return [page for each in (node.values() if isinstance(node, dict) else node) for page in _menu(each)]


def test_every_page_is_in_the_menu_once() -> None:
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    text = (ROOT / "mkdocs.yml").read_text()
    menu = _menu(yaml.safe_load(text)["nav"])
    assert pages | GENERATED == set(menu), "mkdocs.yml: `nav` names each page of docs/"
    assert len(menu) == len(set(menu))


def test_modules_of_the_reference_exist() -> None:
    source = tree(ROOT / "infra" / "site_pages.py")
    (api,) = [
        node.value for node in source.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "API"
    ]
    modules = [name for names in ast.literal_eval(api).values() for name in names]
    missing = [name for name in modules if not Path(ROOT, *name.split(".")).with_suffix(".py").is_file()]
    assert not missing
