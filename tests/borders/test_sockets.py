"""Nothing listens beyond loopback: the sockets of the whole process tree, in ranks, in a flow, and in servers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.arch.source_tree import ROOT, python_files
from tests.borders.sockets import LOOK_EVERY_S, Watch
from tests.flows.conftest import Project, copy_project, wait_until
from tests.patience import LONGEST_S


def test_a_socket_on_all_interfaces_is_seen() -> None:
    code = "import socket; held = [socket.create_server((host, 0)) for host in ('0.0.0.0', '127.0.0.1')]"
    argv = [sys.executable, "-c", f"{code}; print(flush=True); input()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline()
        with Watch(child.pid) as watch:
            wait_until(lambda: len(watch.found) == 2, LONGEST_S)
        child.communicate("\n")
    assert [host for host, _ in watch.beyond_loopback] == ["0.0.0.0"]


@pytest.mark.ranks
def test_ranks_of_one_machine_meet_without_a_store_that_listens(tmp_path: Path) -> None:
    """The toy trains on two ranks; gloo's own sockets are on loopback, and the store is a file that only we read."""
    settings = json.dumps({"batch_size": 2, "epochs": 40, "validate_every": 1_000_000})
    rank = [sys.executable, "-m", "tests.training.toy", str(tmp_path / "work"), settings]
    start = "import sys; from dllm.training import launch; sys.exit(launch.run(sys.argv[1:], 2))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", start, *rank], cwd=ROOT, env=environment) as ranks:
        folders: set[tuple[str, int]] = set()
        with Watch(ranks.pid) as watch:
            while ranks.poll() is None:
                for folder in tmp_path.glob("dllm-ranks-*"):
                    with contextlib.suppress(FileNotFoundError):
                        folders.add((folder.name, folder.stat().st_mode & 0o777))
                time.sleep(LOOK_EVERY_S)
    assert ranks.returncode == 0
    assert watch.found and not watch.beyond_loopback
    assert [mode for _, mode in folders] == [0o700]
    assert not list(tmp_path.glob("dllm-ranks-*"))


def test_dvc_starts_stages_without_torchrun() -> None:
    assert "torchrun" not in (ROOT / "dvc.yaml").read_text()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Make a project that trains on two ranks."""
    folder = tmp_path_factory.mktemp("project")
    copy_project(folder)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["train"] |= {"nproc": 2}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return Project(folder, folder / ".prefect")


@contextlib.contextmanager
def running(project: Project, *argv: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        argv, cwd=project.folder, env=project.environment | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        yield process


@pytest.mark.flows
@pytest.mark.outage
def test_a_flow_with_all_its_stages(project: Project) -> None:
    with running(project, sys.executable, "-m", "flows.pipeline") as flow, Watch(flow.pid) as watch:
        said, _ = flow.communicate()
    assert flow.returncode == 0, said
    assert watch.found, "Prefect's temporary server, and gloo"
    assert not watch.beyond_loopback


VERBS = [
    "generate --checkpoint out/train/checkpoint --prompt hello --max-new-tokens 4",
    "data show out/regenerate",
    "report",
    "verify",
    "track sync",
]


@pytest.mark.flows
@pytest.mark.outage
@pytest.mark.parametrize("verb", VERBS)
def test_no_other_verb_listens(project: Project, verb: str) -> None:
    assert (project.folder / "out/train/checkpoint").exists(), "by the flow above"
    with running(project, sys.executable, "-m", "dllm", *verb.split()) as process, Watch(process.pid) as watch:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert not watch.beyond_loopback


@pytest.mark.flows
@pytest.mark.outage
@pytest.mark.parametrize("what", ["ui", "serve"])
def test_servers(project: Project, what: str) -> None:
    ports = {"PREFECT_PORT": str(4300 + os.getpid() % 500), "MLFLOW_PORT": str(5300 + os.getpid() % 500)}
    with (
        running(project, sys.executable, "infra/services.py", what, **ports) as services,
        Watch(services.pid) as watch,
    ):
        assert services.stdout is not None
        said = []
        while not (said and "Ctrl-C" in said[-1]):
            said.append(services.stdout.readline())
            assert said[-1], said
        expected = {int(port) for port in (ports.values() if what == "ui" else [ports["PREFECT_PORT"]])}
        wait_until(lambda: expected <= {port for _, port in watch.found}, LONGEST_S)
        services.terminate()
        services.communicate()
    assert not watch.beyond_loopback


def test_no_value_of_params_stands_in_a_command() -> None:
    """DVC would put it there unquoted, and a shell would run what it says."""
    assert "${" not in (ROOT / "dvc.yaml").read_text()


def test_no_command_is_built_for_a_shell() -> None:
    for path in python_files("dllm", "flows", "infra"):
        assert not re.search(r"shell=True|os\.system\(|os\.popen\(|getoutput\(", path.read_text()), path
