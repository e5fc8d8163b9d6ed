"""The services of infra/compose.yaml as processes on loopback: their own commands and environments, other addresses."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.arch.source_tree import ROOT
from tests.flows.conftest import copy_project

DEADLINE_S = 300.0
CLEAN_UP_S = 60.0
"""What a server has to end in before it is killed: nothing depends on how it ends."""
PORTS = {
    "postgres": 5432,
    "s3": 9000,
    "prefect": 4200,
    "mlflow": 5000,
    "exporter": 9400,
    "worker": 8080,
    "prometheus": 9090,
}
POSTGRES = ("initdb", "postgres", "pg_isready", "psql")


def free_port() -> int:
    """Find a port that nobody holds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(true: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
    """Wait until something holds, and return it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"{what}: still not after {seconds:g} s"
        time.sleep(0.5)
    return found


def program(name: str) -> str | None:
    """Find a program on the path, or where Debian keeps PostgreSQL's."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(debian[-1]) if debian else shutil.which(name)


class Stack:
    """Services that run, each with its log in a folder.

    Args:
        folder: for data, logs and the project.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.project = folder, folder / "project"
        self.ports = {name: free_port() for name in PORTS}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        copy_project(self.project)
        subprocess.run(["bash", "infra/secrets.sh"], cwd=self.project, check=True, capture_output=True)
        self._services = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())["services"]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "DLLM_", "AWS_"))}
        self._environment = kept | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "DVC_NO_ANALYTICS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONUNBUFFERED": "1",
        }

    def secret(self, name: str) -> str:
        """Read a secret."""
        return (self.project / "infra" / "secrets" / name).read_text()

    def environment(self, service: str) -> dict[str, str]:
        """Return the environment of a service, with secrets read as its entrypoint does."""
        own = {name: self._local(str(value)) for name, value in self._services[service]["environment"].items()}
        own.pop("HOME", None)
        own.pop("DLLM_GATE_BIND", None)
        environment = self._environment | own
        for name in [name for name in own if name.endswith("_FILE")]:
            environment[name.removesuffix("_FILE")] = Path(environment.pop(name)).read_text().strip()
        return environment

    def start(self, service: str) -> None:
        """Start a service of compose.yaml, and wait until its health check passes."""
        command = [self._local(word) for word in self._services[service]["command"]]
        environment = self.environment(service)
        self.spawn(service, [sys.executable if word == "python" else word for word in command], environment)
        check = [sys.executable, str(self.project / "infra" / "images" / "health.py")]
        healthy = lambda: subprocess.run(check, env=environment, capture_output=True).returncode == 0  # noqa: E731
        wait_until(lambda: self.alive(service) and healthy(), f"{service} is healthy")

    def run(self, service: str) -> None:
        """Run a service that ends, to its end."""
        command = [self._local(word) for word in self._services[service]["command"]]
        done = subprocess.run(
            [sys.executable, *command[1:]],
            cwd=self.project,
            env=self.environment(service),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def spawn(self, name: str, command: list[str], environment: Mapping[str, str], **more: Any) -> None:
        """Start a process with a log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=self.project, env=dict(environment), stdout=log, stderr=log, **more
            )

    def alive(self, name: str) -> bool:
        """Return True while a service runs; fail with its log once it has ended."""
        log = (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]
        assert self.processes[name].poll() is None, f"{name} has ended:\n{log}"
        return True

    def start_postgres(self) -> None:
        """Start PostgreSQL as a user who is not root, with the databases of the image's script."""
        data = self.folder / "postgres"
        data.mkdir()
        user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        if user:
            shutil.chown(data, "postgres", "postgres")
        password = data.with_suffix(".password")
        password.write_text(self.secret("postgres_password"))
        if user:
            shutil.chown(password, "postgres", "postgres")
        initdb = [str(program("initdb")), "--pgdata", str(data / "data"), "--username", "dllm", "--no-sync"]
        auth = ["--auth", "scram-sha-256", "--pwfile", str(password), "--encoding", "UTF8"]
        subprocess.run([*initdb, *auth], check=True, capture_output=True, cwd=data, **user)
        argv = [str(program("postgres")), "-D", str(data / "data"), "-k", "", "-h", "127.0.0.1"]
        self.spawn("postgres", [*argv, "-p", str(self.ports["postgres"])], self._environment, **user)
        where = ["--host", "127.0.0.1", "--port", str(self.ports["postgres"]), "--username", "dllm"]
        is_ready = [str(program("pg_isready")), *where]
        wait_until(lambda: subprocess.run(is_ready, capture_output=True).returncode == 0, "PostgreSQL listens")
        environment = self._environment | {"PGPASSWORD": self.secret("postgres_password")}
        psql = [str(program("psql")), *where, "--dbname", "postgres", "--quiet"]
        more = ["--command", "CREATE DATABASE mlflow", "--file", str(ROOT / "infra" / "images" / "databases.sql")]
        subprocess.run([*psql, *more], check=True, env=environment, capture_output=True)

    def kill(self, name: str) -> None:
        """Kill a service and all below it at once, as a machine that goes down."""
        tree = [*psutil.Process(self.processes[name].pid).children(recursive=True), self.processes[name]]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.processes.pop(name).wait()

    def stop(self) -> None:
        """Stop everything, the last started first."""
        for process in reversed(self.processes.values()):
            process.terminate()
            try:
                process.wait(CLEAN_UP_S)
            except subprocess.TimeoutExpired:  # Prefect's own worker now and then does not end
                process.kill()
                process.wait()

    def _local(self, text: str) -> str:
        """Fill in variables, and write addresses and folders as they are on this machine."""
        chosen = {f"{name.upper()}_PORT": str(port) for name, port in self.ports.items()}
        text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: chosen.get(match[1], match[2]), text)
        if text in (own := {str(port): str(self.ports[name]) for name, port in PORTS.items()}):
            return own[text]
        for name, port in PORTS.items():
            text = re.sub(rf"\b({name}|127\.0\.0\.1):{port}\b", f"127.0.0.1:{self.ports[name]}", text)
        text = text.replace("0.0.0.0", "127.0.0.1")
        text = re.sub(r"\b(prefect|mlflow):(?=\d)", "127.0.0.1:", text)
        text = text.replace("/run/secrets/", f"{self.project}/infra/secrets/")
        return re.sub(r"^/(project|data|cache)\b", lambda match: str(self.folder / match[1]), text)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """All servers, healthy, and a worker."""
    missing = [name for name in POSTGRES if program(name) is None] + [n for n in ("rclone",) if not shutil.which(n)]
    assert not missing, f"not installed: {missing}; apt-get install postgresql, and make test-stack"
    with tempfile.TemporaryDirectory(prefix="dllm-stack-") as folder:
        Path(folder).chmod(0o755)  # PostgreSQL's user goes through it
        running = Stack(Path(folder))
        try:
            running.start_postgres()
            for service in ("s3", "prefect", "mlflow", "exporter"):
                running.start(service)
            running.run("deploy")
            running.start("worker")
            yield running
        finally:
            running.stop()
