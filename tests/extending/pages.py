"""The pages of docs/extending as packages from outside: their code and their one line, on a path of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.arch.source_tree import ROOT
from tests.patience import LONGEST_S

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r'^\[project\.entry-points\."(dllm\.\w+)"\]\n([\w-]+) = "([\w.]+:\w+)"\n$')


def blocks(page: str) -> dict[str, list[str]]:
    """Collect the fenced blocks of a page by their language."""
    found: dict[str, list[str]] = {}
    for language, text in FENCE.findall((ROOT / "docs" / "extending" / f"{page}.md").read_text()):
        found.setdefault(language, []).append(text)
    return found


def install(page: str, folder: Path) -> Path:
    """Lay the page's member out as an installed package: one file, one line. Return the folder for PYTHONPATH."""
    (code,), (line,) = blocks(page)["python"], blocks(page)["toml"]
    entry = ENTRY.match(line)
    assert entry, f"{page}.md: expected one entry point, got {line!r}"
    name = code.splitlines()[0].removeprefix("# ")
    (folder / name).write_text(code)
    info = folder / f"{name.removesuffix('.py')}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {page}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{entry[1]}]\n{entry[2]} = {entry[3]}\n")
    return folder


class Shell:
    """Runs `python -m dllm` in a project's folder, with the packages of some pages installed."""

    def __init__(self, folder: Path, *packages: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, [*packages, ROOT])),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "OMP_NUM_THREADS": "1",
        }

    def dllm(self, *words: str) -> str:
        """Run a verb; return what it printed.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(
            [sys.executable, "-m", "dllm", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout
