"""The commands of docs/dvc.md and docs/mlflow.md, run in a finished project as its user would type them."""

import re
import shutil
from pathlib import Path

import pytest

from tests.arch.source_tree import ROOT
from tests.dvc.test_teammate import IDENTITY, done, mine
from tests.flows.conftest import Project

pytestmark = [pytest.mark.outage, pytest.mark.flows]
__all__ = ["mine"]
NOT_RUN = ("dvc exp run --queue", "dvc queue start")
"""They start workers that outlive the shell; `dvc exp run --temp`, which runs the same, has a test of its own."""


def commands(page: str, *sections: str) -> list[str]:
    """List the indented lines of a page's sections, without their comments."""
    parts = re.split(r"^## (.*)\n", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    lines = [line for section in sections for line in re.findall(r"^    (\S.*)$", texts[section], re.MULTILINE)]
    return [line.split("  #")[0].strip() for line in lines]


@pytest.fixture
def project(mine: Project, tmp_path: Path) -> Project:
    """Copy the finished project, with one commit on `main`."""
    folder = tmp_path / "project"
    shutil.copytree(mine.folder, folder, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    copy = Project(folder, mine.folder.parent / "prefect")
    done(copy, "git", "init", "--quiet", "--initial-branch", "main")
    done(copy, "git", "add", "--all")
    done(copy, "git", *IDENTITY, "commit", "--quiet", "--message", "first")
    return copy


def test_experiments_are_run_and_compared(project: Project) -> None:
    shown = {}
    for command in commands("dvc.md", "Run experiments", "Compare results", "Compare regenerations"):
        if not command.startswith(NOT_RUN):
            shown[command] = done(project, "bash", "-ec", command)
    assert "long" in shown["dvc exp show --only-changed"]
    assert "steps" in shown["dvc metrics diff main"] and "train.epochs" in shown["dvc params diff main"]


def test_the_champion_is_loaded_as_the_page_says(project: Project) -> None:
    done(project, "python", "-m", "dllm", "register")
    for command in commands("mlflow.md", "Registered checkpoints"):
        command = command.replace("NAME", "tiny-dflash")
        if command.startswith("mlflow."):
            project.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{project.folder}/mlflow.db"
            command = f"python -c 'import mlflow; {command}'"
        done(project, "bash", "-ec", command)
    assert (project.folder / "champion-today" / "metrics.json").is_file()
