"""A checkout for one flow run: a git worktree at a commit, so that runs go side by side, beside the user's files.

It lies in `work/checkouts/` and shares what is safe to share with the project: DVC's cache, work/ (where each
configuration has a locked folder of its own), the MLflow store and the registered checkpoints. So a stage that has run
before, in any checkout, is restored, and one that was killed resumes. Its params.yaml, dvc.lock and out/ are its own.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dvc.config import Config
from prefect import get_run_logger

from dllm.errors import ConfigError, DllmError, StageError
from dllm.files import lock_folder
from dllm.tracking.address import VARIABLE, tracking_uri
from flows import forced
from flows.children import Place

FOLDER = Path("work", "checkouts")
SHARED = ("registered", "mlartifacts")
SHARED_WORK = ("features", "greedy", "tracking")
"""Of work/, what a run from scratch shares too: caches, and what MLflow has not received yet."""
YOUNG_S = 60.0
"""A checkout without a lock that is not older may be about to be locked."""
GIT_S = 600.0
NOBODY = ("-c", "user.name=dllm", "-c", "user.email=dllm@localhost")
"""Who commits, where git knows no one."""


@dataclass(frozen=True)
class Checkout(Place):
    """A worktree of the project at one commit."""

    def save(self, name: str, kind: str) -> str:
        """Keep params.yaml and dvc.lock in the project's repository, and say where.

        Args:
            name: of the flow run.
            kind: `branch` or `experiment`, of DVC.

        Raises:
            StageError: git or DVC refuses.
        """
        name = f"{slug(name)}-{self.logs.name[:8]}"
        if kind == "experiment":
            done = _call([sys.executable, "-m", "dvc", "exp", "save", "--name", name], self.root)
            if done.returncode:
                raise StageError(f"`dvc exp save` failed: {_last_line(done)}", where=str(self.root))
            return f"experiment {name} (`dvc exp apply {name}`)"
        branch = f"runs/{name}"
        _git(self.root, "add", "--", "params.yaml", "dvc.lock")
        message = f"{name}: params and results of a flow run"
        author = () if _call(["git", "var", "GIT_AUTHOR_IDENT"], self.root).returncode == 0 else NOBODY
        _git(self.root, *author, "commit", "--quiet", "--no-verify", "--allow-empty", "--message", message)
        _git(self.root, "branch", "--force", branch, "HEAD")
        return f"branch {branch}"


@contextlib.contextmanager
def checked_out(root: Path, revision: str, name: str, *, from_scratch: bool) -> Iterator[Checkout]:
    """Make a checkout of the project, and remove it, however the block is left.

    Args:
        root: the project's folder.
        revision: a commit, branch or tag.
        name: of its folder; no other checkout has it at the same time.
        from_scratch: whether its stages find no work to resume but that of `name` itself, which is kept until the
            block is left without an exception.

    Raises:
        ConfigError: there is no repository, or no such commit in it.
        StageError: git cannot make it.
    """
    commit = resolve(root, revision)
    folder = root / FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        _remove_left_over(root)
        tree = folder / "tree"
        _remove(root, tree)  # of this very flow run, killed and retried
        _git(root, "worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            prefix = _git(root, "rev-parse", "--show-prefix")
            place = Checkout(tree / prefix, root / "logs" / name, {VARIABLE: tracking_uri(root)})
            own_work = root / forced.FOLDER / name if from_scratch else None
            _share(root, place.root, own_work)
            yield place
            if own_work is not None:
                shutil.rmtree(own_work, ignore_errors=True)
        finally:
            _remove(root, tree)
            shutil.rmtree(folder, ignore_errors=True)


def resolve(root: Path, revision: str) -> str:
    """Return the commit that a branch, a tag or a short hash names.

    Raises:
        ConfigError: there is no repository, or no such commit in it.
    """
    done = _call(["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"], root)
    if done.returncode == 0:
        return done.stdout.strip()
    if _call(["git", "rev-parse", "--git-dir"], root).returncode:
        raise ConfigError(
            "not a git repository, so there is nothing to check out", where=str(root), hint="leave out checkout"
        )
    raise ConfigError(f"git has no commit {revision!r} here", where=str(root), hint="commit first, or name another")


def warn_of_changes(root: Path) -> None:
    """Log which files a checkout lacks: what differs from the last commit."""
    changed = _git(root, "status", "--porcelain", "--untracked-files=no").splitlines()
    if changed:
        files = ", ".join(line.split(maxsplit=1)[-1] for line in changed[:5]) + (", ..." if len(changed) > 5 else "")
        get_run_logger().warning("not in the checkout, since not committed: changes in %s", files)


def slug(name: str) -> str:
    """Write a flow run's name as git takes it in the name of a branch."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.").replace("..", ".").removesuffix(".lock")[:50].strip("-.") or "run"


def _share(root: Path, tree: Path, own_work: Path | None) -> None:
    for name in SHARED:
        (root / name).mkdir(exist_ok=True)
        (tree / name).symlink_to(root / name)
    (tree / "work").symlink_to(own_work or root / "work")
    if own_work is not None:
        own_work.mkdir(parents=True, exist_ok=True)
        for name in SHARED_WORK:
            (root / "work" / name).mkdir(parents=True, exist_ok=True)
            if not (own_work / name).is_symlink():  # there, where the run goes on
                (own_work / name).symlink_to(root / "work" / name)
    local = root / ".dvc" / "config.local"
    if local.is_file():  # logins of remotes
        shutil.copy2(local, tree / ".dvc" / "config.local")
    cache = Config(str(root / ".dvc")).get("cache", {}).get("dir") or str(root / ".dvc" / "cache")
    with Config(str(tree / ".dvc")).edit("local") as settings:
        settings.setdefault("cache", {})["dir"] = cache
    if files := _git(tree, "ls-files", "--", "*.dvc").splitlines():
        done = _call([sys.executable, "-m", "dvc", "checkout", "--", *files], tree)
        if done.returncode:
            raise StageError(
                f"`dvc checkout` failed: {_last_line(done)}", where=str(tree), hint="`dvc pull` brings data"
            )


def _remove_left_over(root: Path) -> None:
    """Remove checkouts whose processes were killed outright."""
    for folder in (root / FOLDER).iterdir():
        with contextlib.suppress(DllmError, OSError):
            if folder.is_dir() and time.time() - folder.stat().st_mtime > YOUNG_S:
                with lock_folder(folder):
                    _remove(root, folder / "tree")
                    shutil.rmtree(folder)


def _remove(root: Path, tree: Path) -> None:
    shutil.rmtree(tree, ignore_errors=True)  # removes links, and nothing behind them
    _call(["git", "worktree", "prune"], root)


def _git(folder: Path, *arguments: str) -> str:
    done = _call(["git", *arguments], folder)
    if done.returncode:
        raise StageError(f"`git {' '.join(arguments[:2])}` failed: {_last_line(done)}", where=str(folder))
    return done.stdout.strip()


def _call(argv: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=GIT_S, check=False)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return " ".join((lines or [f"exit code {done.returncode}"])[-1].split())[:200]
