"""Regeneration in parts: one by one here, or over a pool's workers; cancelled, resumed, and equal to one run."""

import json
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dllm.errors import ConfigError
from dllm.responses import shards
from flows.artifacts import share
from flows.regenerate_parts import regenerate_parts
from tests.engines.openai.loopback_server import LoopbackServer, echo, serving
from tests.flows.conftest import Project, copy_project, served, wait_until
from tests.patience import LONGEST_S

PROMPTS = 12
AFTER_THE_FIRST = 4


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("regenerate: 120/1000 answers (12%)  3.5 answers/s  4m11s left  tokens/s 88.1", 0.12),
        ("target features: 1e+06/4e+06 tokens (25%)  9,000 tokens/s", 0.25),
        ("train: 224/224 steps (100%)  2.1 steps/s", 1.0),
        ("regenerate: 0/0 answers  0 answers/s", None),
        ("regenerate: 12  3 answers/s", None),
        ("regenerate: 40 rows, 200 tokens (40 stop)", None),
        ("dllm: no prompts (out/prepare): 3/4 answers", None),
        ("", None),
    ],
)
def test_a_bar_moves_with_lines_of_progress_alone(line: str, expected: float | None) -> None:
    assert share(line) == expected


@pytest.mark.parametrize("options", ["--part 0/4", "--model x --output-dir=elsewhere", "--model 'x"])
def test_what_the_flow_says_itself_cannot_be_said_again(options: str) -> None:
    with pytest.raises(ConfigError, match="options"):
        regenerate_parts.fn("in.jsonl", "out", 2, options)


@pytest.fixture(scope="module")
def target() -> Iterator[LoopbackServer]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path) -> Project:
    folder = tmp_path_factory.mktemp("project")
    copy_project(folder)
    chats = [[{"role": "user", "content": f"question {number}"}] for number in range(PROMPTS)]
    chats[5] += [{"role": "assistant", "content": "old"}, {"role": "user", "content": "and then?"}]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return Project(folder, prefect_home)


@pytest.fixture(scope="module")
def workers(project: Project, free_port: int) -> Iterator[None]:
    """Run `make serve`, and another worker for the parts, as on a second machine."""
    argv = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "parts", "--limit", "1", "--name", "second"]
    with served(project, free_port):
        with (project.folder / "logs" / "prefect-worker-second.log").open("wb") as log:
            second = subprocess.Popen(argv, cwd=project.folder, env=project.environment, stdout=log, stderr=log)
        yield
        second.terminate()
        try:
            second.wait(timeout=30)
        except subprocess.TimeoutExpired:  # Prefect's own worker now and then does not end, with nothing left to do
            second.kill()
            second.wait()


def options(target: LoopbackServer) -> list[str]:
    said = f"--model builtin:tiny --target-server {target.url} --temperature 0 --max-new-tokens 64 --shard-size 4"
    return [*said.split(), "--concurrency", "2"]


@pytest.fixture(scope="module")
def single(project: Project, target: LoopbackServer) -> list[shards.Row]:
    """The rows of one run over everything."""
    argv = ["regenerate", "--input-data", "chats.jsonl", "--output-dir", "single", *options(target)]
    done = project.run(sys.executable, "-m", "dllm", *argv)
    assert done.returncode == 0, done.stdout
    return rows(project.folder / "single")


def rows(folder: Path) -> list[shards.Row]:
    return sorted(shards.read_rows(folder), key=lambda row: (row.prompt_id, row.sample, row.turn))


def bars(prefect_home: Path) -> dict[str, float]:
    """Give where each bar stands, by its key."""
    with sqlite3.connect(prefect_home / "prefect.db") as database:
        found = database.execute("select key, data from artifact where type = 'progress' order by updated")
        return {key: float(data) for key, data in found}


def open_runs(prefect_home: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(prefect_home / "prefect.db") as database:
        ended = "('COMPLETED', 'FAILED', 'CANCELLED', 'CRASHED')"
        return database.execute(f"select name, state_type from flow_run where state_type not in {ended}").fetchall()


@pytest.mark.flows
@pytest.mark.heavy
def test_parts_one_after_the_other_make_the_rows_of_one_run(
    project: Project, target: LoopbackServer, single: list[shards.Row], prefect_home: Path
) -> None:
    argv = ["--input-data", "chats.jsonl", "--output-dir", "here", "--parts", "2", *options(target)]
    done = project.run(sys.executable, "-m", "flows.regenerate_parts", *argv)
    assert done.returncode == 0, done.stdout
    assert len(single) == PROMPTS + 1 and rows(project.folder / "here") == single
    assert {f"regenerate-{part}-of-2-progress" for part in (0, 1)} <= bars(prefect_home).keys()


@pytest.mark.flows
@pytest.mark.heavy
def test_a_part_that_fails_is_named_with_its_reason(project: Project, workers: None, prefect_home: Path) -> None:
    given = {"input_data": "chats.jsonl", "output_dir": "failed", "parts": 1, "options": "--model builtin:tini"}
    start = ["prefect", "deployment", "run", "regenerate-parts/local", "--params", json.dumps(given), "--watch"]
    assert project.run(*start).returncode == 1
    with sqlite3.connect(prefect_home / "prefect.db") as database:
        said = str(database.execute("select message from flow_run_state where type = 'FAILED'").fetchall())
    part = "stage regenerate-0-of-1 failed: no built-in model 'builtin:tini'"
    assert f"1 of 1 parts failed; part 0: Failed: StageError: {part}" in said.replace("\\'", "'"), said
    assert not (project.folder / "failed").exists()


@pytest.mark.flows
@pytest.mark.heavy
def test_parts_over_two_workers_cancelled_and_resumed_make_the_rows_of_one_run(
    project: Project, target: LoopbackServer, single: list[shards.Row], prefect_home: Path, workers: None
) -> None:
    go_on, count, guard = threading.Event(), 0, threading.Lock()

    def stuck_after_the_first(body: dict) -> tuple[str, str]:
        nonlocal count
        with guard:
            count += 1
            waits = count > AFTER_THE_FIRST
        if waits:
            go_on.wait(LONGEST_S)
        return echo(body)

    target.reply = stuck_after_the_first
    given = {"input_data": "chats.jsonl", "output_dir": str(project.folder / "pool"), "parts": 3}
    given["options"] = " ".join(options(target))
    start = ["prefect", "deployment", "run", "regenerate-parts/local", "--params", json.dumps(given)]
    said = project.run(*start).stdout
    flow_run = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", said)
    assert flow_run, said
    wait_until(lambda: count > AFTER_THE_FIRST, LONGEST_S)
    project.run("prefect", "flow-run", "cancel", flow_run[0])
    wait_until(lambda: not open_runs(prefect_home), LONGEST_S)
    assert not [process for process in psutil.process_iter() if works_in(process, project.folder / "pool")]
    assert not (project.folder / "pool").exists(), "nothing is joined before all parts are there"
    go_on.set()
    done = project.run(*start, "--watch")
    assert done.returncode == 0, done.stdout + workers_said(project)
    assert rows(project.folder / "pool") == single
    assert bars(prefect_home)["regenerate-parts-progress"] == 100.0


def workers_said(project: Project) -> str:
    return "".join(path.read_text() for path in (project.folder / "logs").glob("prefect-worker-*.log"))


def works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(f"{folder}.parts" in word for word in process.cmdline())
    except psutil.Error:
        return False
