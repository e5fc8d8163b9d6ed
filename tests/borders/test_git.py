"""Outside git, in another user's repository, without git: a commit, or one word why there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dllm.tracking.provenance import git_state
from flows import children
from tests.flows.conftest import Project, copy_project, prefect_home

__all__ = ["prefect_home"]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, and the user's own git settings out of the way."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "params.yaml").write_text("a: 1\n")
    (folder / "dvc.lock").write_text("x\n")
    run(folder, "init", "--quiet")
    commit(folder)
    return folder


def run(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder: Path) -> None:
    run(folder, "add", "--all")
    run(folder, "commit", "--quiet", "--message", "x")


def none(reason: str) -> dict[str, object]:
    return {"commit": None, "dirty": None, "reason": reason}


def test_a_commit_and_whether_it_is_dirty(git: Path) -> None:
    state = {"commit": run(git, "rev-parse", "HEAD").strip(), "dirty": False}
    assert git_state(git) == state
    (git / "new").write_text("untracked")
    (git / "dvc.lock").write_text("each run writes it")
    assert git_state(git) == state
    (git / "params.yaml").write_text("a: 2\n")
    assert git_state(git) == state | {"dirty": True}


def test_shallow_detached_and_in_a_subfolder(git: Path, tmp_path: Path) -> None:
    (git / "models" / "small").mkdir(parents=True)
    (git / "models" / "small" / "params.yaml").write_text("a: 1\n")
    commit(git)
    head = run(git, "rev-parse", "HEAD").strip()
    run(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{git}", "shallow")
    run(tmp_path / "shallow", "checkout", "--quiet", "--detach")
    run(git, "worktree", "add", "--quiet", "--detach", str(tmp_path / "worktree"))
    for folder in ("shallow", "worktree", "project/models/small"):
        assert git_state(tmp_path / folder) == {"commit": head, "dirty": False}


def test_one_word_why_there_is_none(git: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("outside", "empty", "broken", "bin"):
        (tmp_path / name).mkdir()
    run(tmp_path / "empty", "init", "--quiet")
    (tmp_path / "broken" / ".git").write_text("gitdir: /nowhere\n")
    (git / "unpacked").mkdir()
    assert git_state(tmp_path / "outside") == none("outside")
    assert git_state(tmp_path / "empty") == none("empty")
    assert git_state(tmp_path / "broken") == none("broken")
    assert git_state(git / "unpacked") == none("untracked"), "the commit of the repository around it says nothing"
    monkeypatch.setenv("LANGUAGE", "de")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert git_state(tmp_path / "outside") == none("outside"), "in every language"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert git_state(git) == none("uninstalled")
    (tmp_path / "bin" / "git").write_text("not a program")
    (tmp_path / "bin" / "git").chmod(0o755)
    assert git_state(git) == none("uninstalled")


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_another_users_repository(git: Path) -> None:
    for path in [git, *git.rglob("*")]:
        os.chown(path, 12345, 12345)
    assert git_state(git) == none("foreign")


def test_an_archive_of_the_project_tells_dvc_that_there_is_no_git(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / ".dvc").mkdir(parents=True)
    for name in (".dvc/config", ".gitattributes"):
        shutil.copyfile(ROOT / name, project / name)
    (project / "dvc.yaml").write_text("stages: {hello: {cmd: echo hello}}\n")
    run(project, "init", "--quiet")
    commit(project)
    archive = tmp_path / "archive"
    archive.mkdir()
    run(project, "archive", "--output", str(archive / "all.tar"), "HEAD")
    shutil.unpack_archive(archive / "all.tar", archive)
    for folder in (project, archive):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "repro"],
            cwd=folder,
            env=os.environ | {"DVC_NO_ANALYTICS": "1", "GIT_CEILING_DIRECTORIES": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert "no_scm = true" in (archive / ".dvc" / "config").read_text().splitlines()[-1]


@pytest.mark.flows
@pytest.mark.outage
def test_a_copy_outside_git_names_what_to_do(tmp_path: Path, prefect_home: Path) -> None:
    copy_project(tmp_path)
    shutil.rmtree(tmp_path / ".git")
    project = Project(tmp_path, prefect_home)
    done = project.run(sys.executable, "-m", "flows.pipeline", GIT_CEILING_DIRECTORIES=str(tmp_path.parent))
    assert done.returncode == 5
    last = done.stdout.splitlines()[-1]
    assert last.startswith("dllm: ") and "`dvc config core.no_scm true`" in last, done.stdout


@pytest.mark.parametrize("name", ["dvc.yaml", "dvc.lock"])
@pytest.mark.parametrize("text", ["<<<<<<< HEAD\nstages:\n=======\n>>>>>>> other\n", "stages: 1\n"])
def test_a_file_that_dvc_cannot_read_is_named_as_the_cause(tmp_path: Path, name: str, text: str) -> None:
    """DVC names it without the word that marks its other errors."""
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--quiet", "--no-scm"], cwd=tmp_path, check=True)
    (tmp_path / "dvc.yaml").write_text("stages:\n  prepare:\n    cmd: echo\n")
    (tmp_path / name).write_text(text)
    command = [*dvc, "--wait-for-lock", "repro", "--single-item", "prepare"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 255
    said = children.first_complaint([*done.stdout.splitlines(), *done.stderr.splitlines()])
    assert said is not None and name in said, done
    assert ("merge conflicts" in said) == ("HEAD" in text)
