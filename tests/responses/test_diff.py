"""What changed between two folders of responses, and between two commits of a project."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dllm.errors import DataError
from dllm.responses.diff import diff
from dllm.responses.shards import Row
from tests.arch.source_tree import ROOT
from tests.patience import LONGEST_S
from tests.responses.shard_folder import write_rows


def row(number: int, answer: tuple[int, ...] = (1, 2), flags: tuple[str, ...] = (), end: str = "stop") -> Row:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    about = {"sample": 0, "source": "s", "split": "train", "messages": messages, "prompt_ids": [7]}
    ids = list(answer)
    return Row(f"p{number}", answer_ids=ids, finish_reason=end, num_tokens=len(ids), flags=list(flags), **about)


OLD = [row(0), row(1), row(2, (1, 2, 3, 4), ("length",), "length"), row(3)]
NEW = [row(4, (1,) * 8), row(2, (1, 2, 3)), row(0), row(1)]
"""In another order; p3 is gone, p4 is new, p2 is changed."""


def folder(path: Path, rows: list[Row], temperature: float = 0.0) -> Path:
    path.mkdir(parents=True)
    write_rows(rows, path, 2, {"target": {"model": "m"}, "sampling": {"temperature": temperature, "top_p": 1.0}})
    return path


def test_rows_lengths_flags_and_settings(tmp_path: Path) -> None:
    found = diff(folder(tmp_path / "a", OLD), folder(tmp_path / "b", NEW, 0.7), tmp_path)
    assert found["rows"] == {"same": 2, "changed": 1, "added": 1, "removed": 1}
    assert found["prompts"] == {"changed": ["p2"], "added": ["p4"], "removed": ["p3"]}
    assert (found["a"]["tokens"], found["b"]["tokens"]) == (10, 15)
    assert found["b"]["length"] == {"mean": 3.75, "median": 2, "p95": 8, "max": 8}
    assert (found["a"]["flags"], found["b"]["flags"]) == ({"length": 1}, {})
    assert found["settings"] == {"sampling.temperature": [0.0, 0.7]}


def test_the_same_folder_has_no_change_and_samples_and_turns_are_rows_of_their_own(tmp_path: Path) -> None:
    rows = [row(0), replace(row(0), sample=1), replace(row(0), sample=1, turn=1)]
    place = folder(tmp_path / "a", rows)
    found = diff(place, place, tmp_path)
    assert found["rows"] == {"same": 3, "changed": 0, "added": 0, "removed": 0} and not found["settings"]


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", OLD), folder(tmp_path / "b", NEW)
    (b / "shard-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="sha256"):
        diff(a, b, tmp_path)


@pytest.mark.slow
def test_revisions_are_read_from_dvcs_cache_and_leave_the_working_tree_alone(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / ".dvc").mkdir(parents=True)
    for name in (".dvc/config", ".dvc/.gitignore", ".dvc/page.html"):
        shutil.copyfile(ROOT / name, project / name)
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}

    def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, cwd=project, env=environment, capture_output=True, text=True, timeout=LONGEST_S)

    run("git", "init", "--quiet")
    for name, rows in (("one", OLD), ("two", NEW)):
        shutil.rmtree(project / "out", ignore_errors=True)
        folder(project / "out" / "regenerate", rows)
        assert run(sys.executable, "-m", "dvc", "add", "--quiet", "out/regenerate").returncode == 0
        run("git", "add", "--all")
        run("git", "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--quiet", "--message", name)
        run("git", "tag", name)
    shutil.rmtree(project / "out" / "regenerate")
    command = [sys.executable, "-m", "dllm", "data", "diff", "--root", project]
    done = run(*command, "one", "two", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["rows"] == {"same": 2, "changed": 1, "added": 1, "removed": 1}
    assert not (project / "out" / "regenerate").exists() and not run("git", "status", "--porcelain").stdout
    for wrong in ("nothing", "-x"):
        done = run(*command, "one", "--", wrong)
        assert done.returncode in (2, 3) and done.stderr.count("\n") == 1 and wrong in done.stderr, done.stderr
