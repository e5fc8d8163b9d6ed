"""Servers, workers and flows that are killed outright: nothing is left, and what can go on goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import yaml

from dllm.errors import ServerError
from dllm.tracking import mlflow_runs as tracking
from infra import servers
from tests.flows.conftest import Project, copy_project, free_port, prefect_home, wait_until
from tests.patience import LONGEST_S

__all__ = ["free_port", "prefect_home"]

# A stage that is under way until the file `go` is there.
STAGE = """
import pathlib
from dllm.config.load import load_params
from dllm.process import signals
from dllm.process.output import outlive_readers
from dllm.stages import workspace as contract
root = pathlib.Path()
params = load_params("params.yaml")
outlive_readers()
with signals.handled(), contract.open_stage("prepare", params, sections=[params.prepare], root=root) as stage:
    (root / "under-way").write_text(stage.tracker.run_id)
    while not (root / "go").exists():
        signals.sleep(0.1)
"""


@pytest.fixture
def project(tmp_path: Path, prefect_home: Path) -> Iterator[Project]:
    copy_project(tmp_path)
    (tmp_path / "stage.py").write_text(STAGE)
    stages = {
        stage: {"cmd": "python stage.py" if stage == "prepare" else "true", "always_changed": True}
        for stage in ("prepare", "regenerate", "train", "evaluate")
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    project = Project(tmp_path, prefect_home)
    yield project
    for process in living(project):  # of a test that failed
        process.kill()


def start(project: Project, *argv: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start a command as a shell in a terminal does: a process group of its own."""
    with (project.folder / "said.txt").open("w") as stream:
        return subprocess.Popen(
            [sys.executable, *argv],
            cwd=project.folder,
            env=project.environment | environment,
            stdout=stream,
            stderr=stream,
            process_group=0,
        )


def said(project: Project) -> str:
    return (project.folder / "said.txt").read_text()


def living(project: Project, *words: str) -> list[psutil.Process]:
    """List the project's processes, or those whose command line has all the words, without their supervisors."""
    found = []
    for process in psutil.process_iter(["pid", "environ", "cmdline", "status"]):
        info = process.info
        is_ours = (info["environ"] or {}).get("DLLM_HOME") == str(project.folder) and info["status"] != "zombie"
        line = info["cmdline"] or []
        if is_ours and all(word in line for word in words) and not (words and "-I" in line):
            found.append(process)
    return found


def under_way(project: Project) -> str:
    """Wait for the stage, and return its MLflow run."""
    path = project.folder / "under-way"
    wait_until(lambda: path.exists() and path.read_text(), LONGEST_S)
    run_id = path.read_text()
    path.unlink()
    return run_id


def expect_nothing_left(project: Project, run_id: str) -> None:
    wait_until(lambda: not living(project), 60)
    assert not list(project.folder.glob("prefect.toml*"))
    client = tracking.connect(f"sqlite:///{project.folder}/mlflow.db")
    assert client.get_run(run_id).info.status == "KILLED"


@pytest.mark.flows
@pytest.mark.outage
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGHUP], ids=["killed outright", "terminal closed"])
def test_make_run_leaves_nothing_and_the_next_call_resumes(project: Project, blow: int) -> None:
    flow = start(project, "-m", "flows.pipeline")
    run_id = under_way(project)
    if blow == signal.SIGKILL:
        expect_strangers_refused(project)
        expect_serve_refused(project, f"Prefect's database is in use: another process works on this (pid {flow.pid})")
    os.killpg(flow.pid, blow)
    assert flow.wait(timeout=LONGEST_S) == (-9 if blow == signal.SIGKILL else 128 + signal.SIGHUP), said(project)
    expect_nothing_left(project, run_id)
    (project.folder / "go").touch()
    assert project.run(sys.executable, "stage.py").returncode == 0
    client = tracking.connect(f"sqlite:///{project.folder}/mlflow.db")
    assert client.get_run(run_id).info.status == "FINISHED" and under_way(project) == run_id


def expect_serve_refused(project: Project, why: str) -> None:
    """Two servers over one database: the second would mark as crashed what the first one runs."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    second = project.run(sys.executable, "infra/services.py", "serve", PREFECT_PORT=str(port))
    assert second.returncode == 5 and why in second.stdout and len(second.stdout.splitlines()) == 1, second.stdout


def expect_strangers_refused(project: Project) -> None:
    """Look at all sockets that listen: on loopback only, and each asks for a password."""
    listening = [
        connection.laddr
        for process in living(project)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    for address in listening:
        assert address.ip == "127.0.0.1"
        for path in ("/api/flows/filter", "/api/health", "/docs"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"http://127.0.0.1:{address.port}{path}", timeout=LONGEST_S)
            assert refused.value.code == 401


@pytest.mark.flows
@pytest.mark.outage
def test_make_serve_restarts_what_dies_and_leaves_nothing_when_killed(project: Project, free_port: int) -> None:
    port = str(free_port)
    serve = start(project, "infra/services.py", "serve", PREFECT_PORT=port)
    wait_until(lambda: "Ctrl-C" in said(project), LONGEST_S)
    limited = project.run("prefect", "work-pool", "set-concurrency-limit", "local", "1")
    assert limited.returncode == 0, limited.stdout
    written = (project.folder / "prefect.toml").read_text()
    expect_serve_refused(project, "Prefect's database is in use")
    for name, words in {"prefect-worker-parts": ["worker", "parts"], "prefect-server": ["prefect", port]}.items():
        wait_until(lambda words=words: len(living(project, sys.executable, *words)) == 1, LONGEST_S)
        (before,) = living(project, sys.executable, *words)
        before.kill()
        wait_until(lambda name=name: f"{name} has ended; it is started again" in said(project), LONGEST_S)
        wait_until(lambda words=words, before=before: living(project, sys.executable, *words) not in ([], [before]), 60)
    wait_until(lambda: "listening" in (project.folder / "logs/prefect-server.log").read_text()[30:], LONGEST_S)
    assert (project.folder / "prefect.toml").read_text() == written, "clients go on with the same password"
    run_id = deploy(project)
    os.killpg(serve.pid, signal.SIGKILL)
    serve.wait()
    expect_nothing_left(project, run_id)

    serve = start(project, "infra/services.py", "serve", PREFECT_PORT=port)
    wait_until(lambda: "Ctrl-C" in said(project), LONGEST_S)
    assert deploy(project) == run_id, "the killed flow run holds no slot of its pool, and its stage is resumed"
    (pool,) = [pool for pool in ask(project, "work_pools/filter") if pool["name"] == "local"]
    assert pool["concurrency_limit"] == 1, "set by the user, kept by `make serve`"
    states = [run["state_type"] for run in ask(project, "flow_runs/filter")]
    assert set(states) == {"CRASHED", "RUNNING"} and states.count("RUNNING") == 1
    for _ in range(3):
        serve.send_signal(signal.SIGTERM)
    assert serve.wait(timeout=LONGEST_S) == 0 and said(project).endswith("stopped\n")
    expect_nothing_left(project, run_id)


def deploy(project: Project) -> str:
    done = project.run("prefect", "deployment", "run", "pipeline/project")
    assert done.returncode == 0, done.stdout
    return under_way(project)


def ask(project: Project, what: str) -> list[dict[str, object]]:
    api = tomllib.loads((project.folder / "prefect.toml").read_text())["api"]
    found: list[dict[str, object]] = servers.request(f"{api['url']}/{what}", api["auth_string"], {})
    return found


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """infra/services.py, with its logs in a folder of the test's own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "infra"))
    import servers as started_by
    import services

    monkeypatch.setattr(started_by, "ROOT", tmp_path)
    monkeypatch.setattr(services, "PAUSES_S", (0.0, 0.0, 0.0))
    return services


def test_what_keeps_ending_is_named_and_given_up(services: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    kept = services.Kept(services.Service("worker-x", [sys.executable, "-c", "print('no disk')"]), is_server=False)

    def restarted() -> bool:
        kept.start_again_if_ended()
        return False

    with pytest.raises(ServerError, match=r"worker-x has ended 4 times \(logs/worker-x.log\)"):
        wait_until(restarted, LONGEST_S)
    assert capfd.readouterr().out.count("worker-x has ended; it is started again in 0 s (logs/worker-x.log)") == 3
    assert kept.service.log.read_text() == "no disk\n" * 4
    kept.service.stop()


def test_a_client_file_without_its_server_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prefect.toml"
    monkeypatch.setattr(servers, "PREFECT_TOML", path)
    assert servers.recorded_api() == {}
    api = {"url": "http://127.0.0.1:1/api", "auth_string": "a:b"}
    text = "[api]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in api.items())
    path.write_text(text)
    assert servers.recorded_api() == api, "the user's own file"
    path.write_text(f"{servers.HEADER}\n{text}")
    lock = "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", lock, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout and server.stdout.readline()
        assert servers.recorded_api() == api and path.exists()
        server.kill()
    assert servers.recorded_api() == {} and not path.exists()
    path.write_text("[api")
    assert servers.recorded_api() == {}
