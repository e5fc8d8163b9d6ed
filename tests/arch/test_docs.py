"""What the docs name exists: verbs and options, make targets, links, paths, functions, recipes, keys."""

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from dllm.cli.app import app
from dllm.config import recipe_book
from dllm.config.load import load_params
from tests.arch.source_tree import ROOT, tree
from tests.patience import LONGEST_S

DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CODE = re.compile(r"```[^`]*```|`[^`\n]+`|^    [^\n]+$", re.MULTILINE)
PATH = re.compile(r"^(dllm|flows|tests|benchmarks|infra|docs)/[\w/.-]*$")


def _snippets(path: Path) -> list[str]:
    lines = [line for code in CODE.findall(path.read_text()) for line in code.strip("`").splitlines()]
    return [line.split(" #")[0].strip() for line in lines]


def _commands(start: str) -> Iterator[tuple[str, list[str]]]:
    for path in DOCS:
        for snippet in _snippets(path):
            for part in re.split(r"&&|;", snippet):
                if start in part:
                    yield path.name, shlex.split(part[part.index(start) + len(start) :], comments=True)


@cache
def _verbs() -> dict[str, set[str]]:
    """Map each verb, `recipe use` included, to its options."""
    top = typer.main.get_command(app)
    found = {}
    for name, command in top.commands.items():
        for inner, leaf in getattr(command, "commands", {"": command}).items():
            found[f"{name} {inner}".strip()] = {option for parameter in leaf.params for option in parameter.opts}
    return found


def test_there_are_docs_and_commands_in_them() -> None:
    assert {"README.md", "concepts.md", "recipes.md", "operations.md", "experiments.md"} <= {p.name for p in DOCS}
    assert len(list(_commands("-m dllm "))) > 10


@pytest.mark.parametrize(("document", "words"), list(_commands("-m dllm ")), ids=lambda value: str(value)[:60])
def test_every_command_is_a_verb_with_its_options(document: str, words: list[str]) -> None:
    verbs = _verbs()
    plain = [word for word in words if not word.startswith("-")]
    verb = next((name for name in (" ".join(plain[:2]), plain[0] if plain else "") if name in verbs), None)
    if words[:1] == ["--help"] or words == ["recipe"]:
        return
    assert verb, f"{document}: no verb {words}"
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    assert given <= verbs[verb] | {"--help"}, f"{document}: {verb} has no {given - verbs[verb]}"
    for index, word in enumerate(words):
        if word == "--set":
            load_params(ROOT / "params.yaml", [words[index + 1]])


@pytest.mark.skipif(not (ROOT / ".venv/bin/dvc").exists(), reason="needs `make setup`")
def test_one_line_of_the_readme_enters_the_environment_from_a_plain_shell() -> None:
    (line,) = {words for words in _snippets(ROOT / "README.md") if words.startswith(". ")}
    code = f"{line} && command -v python dvc prefect && python -m dllm recipe list >/dev/null"
    plain = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, env=plain, capture_output=True, text=True, timeout=LONGEST_S)
    assert done.stdout.split() == [str(ROOT / ".venv/bin" / name) for name in ("python", "dvc", "prefect")], done.stderr
    assert done.returncode == 0, done.stderr


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[0] for _, words in _commands("make ") if words and re.fullmatch(r"[a-z-]+", words[0])}
    assert named <= targets | {"and"}, f"no such target: {sorted(named - targets)}"
    assert {"setup", "run", "test", "ui", "serve"} <= targets


def test_every_link_leads_somewhere() -> None:
    for path in DOCS:
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not link.startswith("http"):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_every_path_exists() -> None:
    for path in DOCS:
        for word in {word.strip(".,") for snippet in _snippets(path) for word in snippet.split() if PATH.match(word)}:
            assert (ROOT / word).exists() or "NAME" in word, f"{path.name}: {word}"


def test_every_function_exists() -> None:
    named = {word for path in DOCS for word in re.findall(r"`(dllm\.[\w.]+)`", path.read_text())}
    assert len(named) > 10
    for name in sorted(named):
        assert _is_defined(name), f"docs name {name}"


def _is_defined(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:cut])
        file = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        if not file.is_file():
            continue
        body: list[ast.stmt] = tree(file).body
        for part in parts[cut:]:
            inner = [node for node in body if getattr(node, "name", None) == part]
            if not inner:
                return False
            body = getattr(inner[0], "body", [])
        return True
    return False


def test_every_recipe_is_described_and_nothing_else() -> None:
    for document in ("README.md", "docs/recipes.md"):
        text = (ROOT / document).read_text()
        assert [name for name in recipe_book.names() if f"`{name}`" not in text] == [], document


def test_every_environment_variable_is_listed() -> None:
    listed = (ROOT / "docs" / "operations.md").read_text()
    for path in (ROOT / "dllm").rglob("*.py"):
        for name in re.findall(r"\"((?:DLLM|OPENAI|MLFLOW_TRACKING)_[A-Z_]+)\"", path.read_text()):
            assert f"`{name}`" in listed, f"{path.name} reads {name}; docs/operations.md does not say so"


def test_no_placeholder_is_left() -> None:
    assert [path.name for path in DOCS if "TODO" in path.read_text()] == []


def test_the_instructions_for_agents_stay_short() -> None:
    assert len((ROOT / "AGENTS.md").read_text().splitlines()) <= 40
