"""A flow whose stages fail on purpose: what is retried, what is printed, and who holds the GPU."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from tests.flows.conftest import Project, copy_project, wait_until
from tests.patience import LONGEST_S

pytestmark = [pytest.mark.flows, pytest.mark.slow]

# Stands in for `python -m dllm <stage>`: counts its calls, says one line, and leaves with a code.
STAGE = """
import pathlib, sys
stage, *codes = sys.argv[1:]
calls = pathlib.Path(f"{stage}.calls")
count = len(calls.read_text()) if calls.exists() else 0
calls.write_text("x" * (count + 1))
code = int(codes[min(count, len(codes) - 1)])
if code:
    print(f"dllm: {stage} is out of order (call {count + 1})", file=sys.stderr)
sys.exit(code)
"""
IMPATIENT = """
import sys
from flows import pipeline
from flows.in_process import run
pipeline.regenerate = pipeline.regenerate.with_options(retry_delay_seconds=0)
sys.exit(run(pipeline.pipeline))
"""


@pytest.fixture
def project(tmp_path: Path, prefect_home: Path) -> Project:
    copy_project(tmp_path)
    (tmp_path / "stage.py").write_text(STAGE)
    return Project(tmp_path, prefect_home)


def set_codes(project: Project, **codes: str) -> None:
    stages = {
        stage: {"cmd": f"python stage.py {stage} {codes.get(stage, '0')}", "always_changed": True}
        for stage in ("prepare", "regenerate", "train", "evaluate")
    }
    (project.folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))


def calls(project: Project, stage: str) -> int:
    path = project.folder / f"{stage}.calls"
    return len(path.read_text()) if path.exists() else 0


def impatient(project: Project) -> subprocess.CompletedProcess[str]:
    return project.run(sys.executable, "-c", IMPATIENT)


def test_only_a_server_out_of_reach_is_tried_again(project: Project, prefect_home: Path, tmp_path: Path) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'GPU 0: a stand-in (UUID: GPU-aa11)'\n")
    smi.chmod(0o755)
    project.environment["PATH"] = f"{smi.parent}:{project.environment['PATH']}"
    set_codes(project, regenerate="4 4 0", train="3")
    done = impatient(project)
    assert [calls(project, stage) for stage in ("prepare", "regenerate", "train", "evaluate")] == [1, 3, 1, 0]
    assert done.returncode == 5 and "Traceback" not in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last == "dllm: stage train failed: train is out of order (call 1) (logs/train.log)"
    assert "train is out of order" in (project.folder / "logs" / "train.log").read_text()
    with sqlite3.connect(prefect_home / "prefect.db") as database:
        slots = database.execute(
            'select name, "limit", active_slots from concurrency_limit_v2 where name like ?', ("gpu:%",)
        )
        assert slots.fetchall() == [("gpu:GPU-aa11", 1, 0)], "the slot was made, taken and given back"


def test_a_server_that_stays_away_ends_the_flow(project: Project) -> None:
    set_codes(project, regenerate="4")
    done = impatient(project)
    assert calls(project, "regenerate") == 4, "once, and three retries"
    assert calls(project, "train") == 0
    assert done.returncode == 4 and "Traceback" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("dllm: stage regenerate failed: regenerate is out of order")


def test_prefect_out_of_reach_is_one_line(project: Project) -> None:
    done = project.run(sys.executable, "-m", "flows.pipeline", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 4
    assert len(done.stdout.splitlines()) == 1
    assert "Prefect's server out of reach" in done.stdout and "http://127.0.0.1:9/api" in done.stdout


def test_sigterm_before_the_flow_begins_leaves_no_temporary_server(project: Project) -> None:
    flow = subprocess.Popen(
        [sys.executable, "-m", "flows.pipeline"],
        cwd=project.folder,
        env=project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(lambda: psutil.Process(flow.pid).children(), LONGEST_S)
    servers = psutil.Process(flow.pid).children(recursive=True)
    flow.terminate()
    said, _ = flow.communicate(timeout=LONGEST_S)
    assert flow.returncode == 143 and "Traceback" not in said
    assert not psutil.wait_procs(servers, timeout=LONGEST_S)[1]
