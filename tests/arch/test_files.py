"""How files look: their size, their names, and a docstring on all that others may call."""

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

from tests.arch.source_tree import PACKAGE, ROOT, line, python_files, tree

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

MAX_LINES = 400
BANNED = {"utils", "util", "helpers", "helper", "common", "misc"}


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_owns_one_idea(path: Path) -> None:
    count = len(path.read_text().splitlines())
    assert count <= MAX_LINES, line(path, f"{count} lines; {MAX_LINES} is the end, cut it by idea")
    assert not BANNED & set(path.relative_to(ROOT).with_suffix("").parts), line(path, "a name that says nothing")


@pytest.mark.parametrize(
    "path", python_files("dllm", "flows", "benchmarks"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_public_things_say_what_they_do(path: Path) -> None:
    module = tree(path)
    if path.name == "__init__.py" and not module.body:
        return
    assert ast.get_docstring(module), line(path, "no docstring that says what the file owns")
    silent = [name for name, node in _public(module) if not ast.get_docstring(node)]
    assert not silent, line(path, f"no docstring: {', '.join(silent)}")


def _public(node: ast.Module | ast.ClassDef, prefix: str = "") -> list[tuple[str, Definition]]:
    found: list[tuple[str, Definition]] = []
    for child in node.body:
        if isinstance(child, Definition) and child.name[0] != "_" and not _is_described_elsewhere(child, bool(prefix)):
            found.append((prefix + child.name, child))
            if isinstance(child, ast.ClassDef):
                found += _public(child, f"{prefix}{child.name}.")
    return found


def _is_described_elsewhere(node: Definition, is_member: bool) -> bool:
    """Tell what has its docstring elsewhere: overrides, methods that a protocol asks for, `main` (its module's)."""
    marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
    if node.name == "main" or marks & {"override", "overload", "setter"}:
        return True
    return is_member and node.name in _protocol_methods()


@cache
def _protocol_methods() -> frozenset[str]:
    classes = [node for path in python_files("dllm") for node in tree(path).body if isinstance(node, ast.ClassDef)]
    protocols = [node for node in classes if any(ast.unparse(base).split("[")[0] == "Protocol" for base in node.bases)]
    methods = [child for node in protocols for child in node.body if isinstance(child, ast.FunctionDef)]
    return frozenset(child.name for child in methods if ast.get_docstring(child))


def test_every_file_of_code_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    data = [path for glob in project["tool"]["setuptools"]["package-data"]["dllm"] for path in PACKAGE.glob(glob)]
    packaged = [path for path in python_files("dllm") if (path.parent / "__init__.py").exists()]
    missing = set(python_files("dllm")) - {*packaged, *data}
    assert not missing, f"neither in a package nor package data, so left out of a wheel: {sorted(map(str, missing))}"
