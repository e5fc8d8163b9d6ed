"""The wheel, unpacked far from the checkout: it holds all that a run needs beside its dependencies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dllm.config import recipe_book
from dllm.responses import verify
from tests.arch.source_tree import ROOT
from tests.engines.fake_sglang import make_environment
from tests.engines.test_sglang import write_params
from tests.patience import LONGEST_S

pytestmark = pytest.mark.slow


class Installed:
    """The unpacked wheel, and a folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.packages, self.work = folder / "packages", folder / "work"
        self.work.mkdir()
        libraries = [path for path in sys.path if path.endswith("site-packages")]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.packages), *libraries])}
        self.environment.pop("DLLM_TARGET_URL", None)
        # Without site: a checkout that is installed for development comes in by a .pth file.
        self.python = [sys.executable, "-S", "-P"]

    def run(self, *words: object) -> str:
        """Run `python -m dllm`, and return what it prints."""
        argv = [*self.python, "-m", "dllm", *map(str, words)]
        done = subprocess.run(
            argv, cwd=self.work, env=self.environment, capture_output=True, text=True, timeout=LONGEST_S, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def regenerate(self, output: str, *more: object) -> dict[str, object]:
        """Run the standalone command over three questions; return its figures."""
        chats = self.work / "chats.jsonl"
        rows = [{"messages": [{"role": "user", "content": f"question {n}"}]} for n in range(3)]
        chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["regenerate", "--input-data", chats, "--output-dir", output, "--max-new-tokens", 4, *more]
        found: dict[str, object] = json.loads(self.run(*words, "--json").splitlines()[-1])
        verify.verify(self.work / output)
        return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "dllm", source / "dllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True, timeout=LONGEST_S)
    shutil.rmtree(source)
    (wheel,) = folder.glob("dllm-*.whl")
    found = Installed(folder)
    zipfile.ZipFile(wheel).extractall(found.packages)
    return found


def test_every_file_of_the_package_is_in_it(installed: Installed) -> None:
    files = {path.relative_to(ROOT) for path in (ROOT / "dllm").rglob("*") if path.suffix in (".py", ".yaml")}
    assert [path for path in sorted(files) if not (installed.packages / path).is_file()] == []


def test_it_runs_from_there_and_knows_the_recipes(installed: Installed) -> None:
    where = [*installed.python, "-c", "import sys, dllm; print(dllm.__file__, *sys.path, sep=chr(10))"]
    said = subprocess.run(where, env=installed.environment, cwd=installed.work, capture_output=True, check=True)
    found = said.stdout.decode().splitlines()
    assert Path(found[0]).is_relative_to(installed.packages) and str(ROOT) not in found
    said_of_recipes = installed.run("recipe", "list")
    assert [name for name in recipe_book.names() if name not in said_of_recipes] == []


def test_it_regenerates_in_process(installed: Installed) -> None:
    assert installed.regenerate("local", "--model", "builtin:tiny")["rows"] == 3


def test_it_serves_sglang_and_regenerates_through_it(installed: Installed) -> None:
    write_params(installed.work, make_environment(installed.work / "environment"))
    notes = installed.work / "notes.json"
    argv = [*installed.python, "-m", "dllm", "serve"]
    environment = {**installed.environment, "NOTES": str(notes)}
    path = f"{installed.work}{os.pathsep}{os.environ['PATH']}"
    (installed.work / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")  # no GPU: SGLang needs modules of ours
    (installed.work / "nvidia-smi").chmod(0o755)
    with subprocess.Popen(
        argv, cwd=installed.work, env={**environment, "PATH": path}, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:")
            modules = Path(json.loads(notes.read_text())["python_path"])
            assert modules.is_relative_to(installed.packages) and (modules / "vllm" / "_custom_ops.py").is_file()
            asking = ["--model", "tiny", "--tokenizer", "builtin:tiny", "--target-server", url]
            assert installed.regenerate("served", *asking)["rows"] == 3
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(LONGEST_S) == 128 + signal.SIGTERM
