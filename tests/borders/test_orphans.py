"""A flow that is killed outright, whose make is, or whose terminal is closed: nothing is left, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from tests.arch.source_tree import ROOT
from tests.flows.conftest import Project, copy_project, wait_until
from tests.patience import LONGEST_S

pytestmark = [pytest.mark.outage, pytest.mark.flows, pytest.mark.kill]

IN_TIME_S = 60.0
"""20 on a machine that does nothing else."""
MAKEFILE = "run:\n\t@DLLM_PARENT=$$PPID exec python -m flows.pipeline\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Make a project whose training, on two ranks, takes longer than any test."""
    folder = tmp_path_factory.mktemp("project")
    copy_project(folder)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["train"] |= {"nproc": 2, "epochs": 100_000, "validate_every": 1_000_000, "log_every": 1}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "Makefile").write_text(MAKEFILE)
    return Project(folder, folder / ".prefect")


def flow_of(make: subprocess.Popen[bytes]) -> psutil.Process:
    (flow,) = psutil.Process(make.pid).children()
    return flow


BLOWS: dict[str, Callable[[subprocess.Popen[bytes]], None]] = {
    "the flow": lambda make: flow_of(make).kill(),
    "make": lambda make: make.kill(),
    "all of the terminal's processes": lambda make: os.killpg(make.pid, signal.SIGKILL),
    "the terminal": lambda make: os.killpg(make.pid, signal.SIGHUP),
}


@pytest.mark.parametrize("struck", BLOWS)
def test_nothing_outlives_it_and_the_next_run_resumes(project: Project, struck: str) -> None:
    latest = project.folder / "work/train"
    before = steps(latest)
    make = subprocess.Popen(
        ["make", "run"], cwd=project.folder, env=project.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    assert make.stdout is not None
    seen: set[psutil.Process] = set()

    def is_training() -> bool:
        assert make.poll() is None, "ended too early"
        seen.update(psutil.Process(make.pid).children(recursive=True))
        return logged(latest) > before and b"train: " in os.read(make.stdout.fileno(), 1 << 20)

    wait_until(is_training, LONGEST_S)
    seen.update(psutil.Process(make.pid).children(recursive=True))
    make.stdout.close()
    BLOWS[struck](make)
    make.wait()
    left = psutil.wait_procs(seen, timeout=IN_TIME_S)[1]
    assert not [process.cmdline() for process in left if process.status() != psutil.STATUS_ZOMBIE]
    assert not (project.folder / "prefect.toml").exists()
    expected = {"pipeline": "KILLED", "prepare": "FINISHED", "regenerate": "FINISHED", "train": "KILLED"}
    assert statuses(project) == expected
    assert steps(latest) > before, "it resumed from the last checkpoint, and made one when it was stopped"


def steps(work: Path) -> int:
    """Return the step of the last checkpoint, 0 without one."""
    found = list(work.glob("*/checkpoints/latest"))
    return int(found[0].read_text().strip().removeprefix("step-")) if found else 0


def logged(work: Path) -> int:
    """Return the number of records of training."""
    found = list(work.glob("*/training.jsonl"))
    return len(found[0].read_text().splitlines()) if found else 0


def statuses(project: Project) -> dict[str, str]:
    """Return the status of each stage's MLflow run, and of the one around them: calls that resume go on with theirs."""
    query = "select coalesce(t.value, 'pipeline'), r.status from runs r left join tags t on t.run_uuid = r.run_uuid"
    with contextlib.closing(sqlite3.connect(project.folder / "mlflow.db")) as database:
        found = database.execute(f"{query} and t.key = 'dllm.stage'").fetchall()
    assert len(dict(found)) == len(found), "one run a stage"
    return dict(found)


def test_make_run_gives_its_flow_the_number_to_follow() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nrun:")[2].partition("\n\n")[0]
    assert "DLLM_PARENT=$$PPID" in recipe and "exec python -m flows.pipeline" in recipe


def test_a_second_run_names_the_first_and_starts_nothing(project: Project) -> None:
    hold = (
        "import sys, time; from flows.children import ROOT, alone\nwith alone(ROOT): print(flush=True); time.sleep(600)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", hold], cwd=project.folder, env=project.environment, stdout=subprocess.PIPE
    )
    assert first.stdout is not None and first.stdout.readline()
    second = project.flow()
    first.kill()
    first.wait()
    line = f"dllm: another process works on this (pid {first.pid}) ({project.folder}/work); wait for it, or stop it\n"
    assert (second.returncode, second.stdout) == (5, line)


def test_a_run_beside_dvc_names_it_and_does_not_advise_to_delete_its_lock(project: Project) -> None:
    repro = subprocess.Popen(
        ["dvc", "repro", "--single-item", "train"], cwd=project.folder, env=project.environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    before = logged(project.folder / "work/train")
    wait_until(lambda: logged(project.folder / "work/train") != before, LONGEST_S)
    second = project.flow()
    os.killpg(repro.pid, signal.SIGTERM)
    repro.wait()
    assert second.returncode == 5 and "manually remove" not in second.stdout
    assert f"another process works on this (pid {repro.pid}: " in second.stdout.splitlines()[-1]
