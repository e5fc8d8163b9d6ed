"""A flow run's own checkout: what it shares, what it keeps, and what is left when it ends."""

import contextlib
import logging
import os
import subprocess
from pathlib import Path

import pytest

from dllm.errors import ConfigError
from dllm.tracking.model_registry import store_path
from flows import checkouts
from flows.forced import Forced


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository whose project is a folder of it, with a commit and a change that is not committed."""
    for variable in ("MLFLOW_TRACKING_URI", "GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "EMAIL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where git knows no author
    root = tmp_path / "repository" / "project"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n['remote \"x\"']\n    url = s3://x\n")
    (root / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (root / ".gitignore").write_text("/out/\n/work\n/registered\n/mlartifacts\n")
    (root / "params.yaml").write_text("committed\n")
    git(root, "init", "--quiet", "..")
    git(root, "add", ".")
    git(root, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "first")
    (root / "params.yaml").write_text("changed\n")
    return root


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_it_shares_stores_and_work_and_leaves_the_users_files(project: Path) -> None:
    (project / ".dvc" / "config.local").write_text("['remote \"x\"']\n    access_key_id = p\n")
    with checkouts.checked_out(project, "HEAD", "one", from_scratch=False) as place:
        assert place.root == project / "work/checkouts/one/tree/project"
        assert (place.root / "params.yaml").read_text() == "committed\n"
        assert place.env == {"MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
        settings = (place.root / ".dvc/config.local").read_text()
        assert f"dir = {project}/.dvc/cache" in settings and "access_key_id = p" in settings
        assert (place.root / "work").resolve() == project / "work"
        assert store_path(place.root, "0" * 64) == store_path(project, "0" * 64)
        (place.root / "work" / "train").mkdir()
        (place.root / "params.yaml").write_text("of the run\n")
        assert git(place.root, "status", "--porcelain") == "M project/params.yaml", "nothing shared is git's business"
    assert (project / "work" / "train").is_dir() and not (project / "work/checkouts/one").exists()
    assert (project / "params.yaml").read_text() == "changed\n" and not (project / "out").exists()
    assert git(project, "worktree", "list").count("\n") == 0


def test_from_scratch_it_finds_no_work_but_the_caches_and_its_own(project: Path) -> None:
    (project / "work" / "train" / "abc").mkdir(parents=True)
    own = project / "work" / "forced" / "one"
    for attempt in ("first", "resumed"):
        with (
            contextlib.suppress(KeyboardInterrupt),
            checkouts.checked_out(project, "HEAD", "one", from_scratch=True) as place,
        ):
            assert (place.root / "work" / "train").exists() == (attempt == "resumed")
            assert (place.root / "work" / "features").resolve() == project / "work" / "features"
            (place.root / "work" / "train").mkdir(exist_ok=True)
            if attempt == "first":
                raise KeyboardInterrupt
        assert own.exists() == (attempt == "first"), "kept until the run succeeds"
    assert (project / "work" / "features").is_dir() and (project / "work" / "train" / "abc").is_dir()


@pytest.mark.parametrize("keep_lock", [False, True])
def test_a_forced_run_begins_from_scratch_once(tmp_path: Path, keep_lock: bool) -> None:
    work, lock = tmp_path / "work" / "train" / "abc", tmp_path / "dvc.lock"

    def begun(run: str) -> Forced:
        work.mkdir(parents=True, exist_ok=True)
        forced = Forced(tmp_path, run, keep_lock=keep_lock)
        forced.begin(["prepare", "train"])
        return forced

    first = begun("one")
    assert not work.exists() and first.is_due("prepare") and first.is_due("train")
    lock.write_text("of this run")
    first.finished("prepare")
    lock.write_text("of the commit")
    resumed = begun("one")
    assert work.exists() and not resumed.is_due("prepare") and resumed.is_due("train")
    assert lock.read_text() == ("of this run" if keep_lock else "of the commit")
    assert begun("two").is_due("prepare") and not work.exists()


def test_a_branch_keeps_params_and_lock(project: Path) -> None:
    with checkouts.checked_out(project, "HEAD", "0123456789", from_scratch=False) as place:
        (place.root / "params.yaml").write_text("of the run\n")
        (place.root / "dvc.lock").write_text("lock\n")
        said = place.save("tiny: lr=1, [a..b]", "branch")
    assert said == "branch runs/tiny-lr-1-a.b-01234567"
    assert git(project, "show", "runs/tiny-lr-1-a.b-01234567:project/dvc.lock") == "lock"
    assert git(project, "rev-parse", "runs/tiny-lr-1-a.b-01234567~1") == git(project, "rev-parse", "HEAD")


def test_what_a_killed_run_has_left_is_removed_by_the_next(project: Path) -> None:
    held = checkouts.checked_out(project, "HEAD", "living", from_scratch=False)
    living = held.__enter__()
    killed = project / "work/checkouts/killed"
    git(project, "worktree", "add", "--quiet", "--detach", str(killed / "tree"))
    for folder in (killed, living.root.parents[1]):
        os.utime(folder, (0, 0))
    with checkouts.checked_out(project, "HEAD", "next", from_scratch=False):
        assert not killed.exists() and living.root.exists()
    held.__exit__(None, None, None)
    assert git(project, "worktree", "list").count("\n") == 0


def test_what_is_wrong_is_named(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="git has no commit 'nonesuch' here"):
        checkouts.resolve(project, "nonesuch")
    with pytest.raises(ConfigError, match="not a git repository"):
        checkouts.resolve(tmp_path, "HEAD")


def test_changes_that_are_not_committed_are_warned_of(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkouts, "get_run_logger", lambda: logging.getLogger("flow run"))
    checkouts.warn_of_changes(project)
    assert caplog.messages == ["not in the checkout, since not committed: changes in project/params.yaml"]
