"""Run the pipeline's servers on loopback until Ctrl-C: `ui` or `serve`.

While Prefect's server runs, `prefect.toml` in the project's folder has its address, so that `prefect` commands and
`make run` find it, and two servers never share one database.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from dllm import secrets
from dllm.errors import DllmError, ServerError, StageError
from dllm.process import children as process
from dllm.process.signals import exit_on
from dllm.tracking.address import is_local, sqlite_path, tracking_uri
from dllm.tracking.store import connect

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
PREFECT_TOML = ROOT / "prefect.toml"
POOLS = {"local": 1, "parts": 2}
"""Work pools, and how many flow runs this machine takes from each at a time. Runs in `local` share out/, where DVC and
the stages refuse a second one. Runs in `parts` write to separate folders."""
READY_S = 300.0


def main(what: str) -> int:
    """Start the servers, print their addresses, and run until one ends or a signal arrives; return the exit code."""
    exit_on(signal.SIGTERM)
    secrets.install()
    try:
        (serve if what == "serve" else ui)()
    except DllmError as error:
        print(f"dllm: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, SystemExit):
        print("stopped")
    finally:
        process.stop_children(grace_s=20)
    return 0


def ui() -> None:
    """Start the web UIs of MLflow and Prefect."""
    mlflow_port, prefect_port = _port("MLFLOW_PORT", 5000), _port("PREFECT_PORT", 4200)
    uri, running = tracking_uri(ROOT), _running_prefect()
    if is_local(uri):
        _check_free(mlflow_port, "MLFLOW_PORT")
    if running is None:
        _check_free(prefect_port, "PREFECT_PORT")
    if is_local(uri):
        where = f"http://{HOST}:{mlflow_port}"
        connect(uri)  # MLflow's server would make its tables in place, and leave them half made when it is killed
        # Relative, since MLflow would take a quoted path for the name of a folder; in the environment, since every user
        # of the machine may read a command line.
        is_ours = sqlite_path(uri) == ROOT / "mlflow.db"
        os.environ["MLFLOW_BACKEND_STORE_URI"] = "sqlite:///mlflow.db" if is_ours else uri
        argv = ["mlflow", "server", "--workers", "1", "--host", HOST]
        mlflow = _start("mlflow", [*argv, "--port", str(mlflow_port)])
    started = [mlflow] if is_local(uri) else []
    if running is None:
        started.append(_start_prefect(prefect_port))
    if is_local(uri):
        _wait_ready(mlflow, f"{where}/health", "mlflow")
    print(f"MLflow   {where if is_local(uri) else uri}")
    print(f"Prefect  {(running or _api(prefect_port)).removesuffix('/api')}")
    _run_until_one_ends(started)


def serve() -> None:
    """Start a Prefect server, deploy the flows of prefect.yaml, and start their workers."""
    port = _port("PREFECT_PORT", 4200)
    _check_free(port, "PREFECT_PORT")
    server = _start_prefect(port)
    for pool in POOLS:
        _prefect("work-pool", "create", pool, "--type", "process", "--overwrite")
    _prefect("--no-prompt", "deploy", "--all")
    workers = [_start_worker(pool, limit) for pool, limit in POOLS.items()]
    print(f"Prefect  {_api(port).removesuffix('/api')}")
    print("run      . infra/env.sh && prefect deployment run 'pipeline/smollm2-dflash' --watch")
    print("logs     logs/prefect-worker-local.log, logs/prefect-worker-parts.log")
    _run_until_one_ends([server, *workers])


def _start_prefect(port: int) -> subprocess.Popen[bytes]:
    os.environ["PREFECT_SERVER_UI_API_URL"] = _api(port)  # else its pages call port 4200, whatever the server's port
    server = _start("prefect-server", ["prefect", "server", "start", "--host", HOST, "--port", str(port)])
    _wait_ready(server, f"{_api(port)}/health", "prefect-server")
    PREFECT_TOML.write_text(f'# Written by infra/services.py while its server runs.\n[api]\nurl = "{_api(port)}"\n')
    atexit.register(PREFECT_TOML.unlink, missing_ok=True)
    os.environ["PREFECT_API_URL"] = _api(port)
    return server


def _start_worker(pool: str, limit: int) -> subprocess.Popen[bytes]:
    argv = ["prefect", "worker", "start", "--pool", pool, "--type", "process", "--limit", str(limit)]
    return _start(f"prefect-worker-{pool}", argv)


def _start(name: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    print(f"starting {name}", flush=True)
    log = ROOT / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", *argv], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            start_new_session=True,
        )  # fmt: skip


def _prefect(*arguments: str) -> None:
    result = process.run([sys.executable, "-m", "prefect", *arguments], cwd=ROOT, deadline_s=READY_S)
    if result.code:
        output = " ".join(" ".join(result.tail).split())[-300:]
        raise ServerError(f"`prefect {' '.join(arguments)}` failed: {output}", where=os.environ["PREFECT_API_URL"])


def _wait_ready(server: subprocess.Popen[bytes], address: str, name: str) -> None:
    end = time.monotonic() + READY_S
    while not _responds(address):
        if server.poll() is not None or time.monotonic() > end:
            raise ServerError(f"{name} did not start", where=address, hint=f"see logs/{name}.log")
        time.sleep(0.2)


def _run_until_one_ends(servers: Sequence[subprocess.Popen[bytes]]) -> None:
    print("Ctrl-C stops it.", flush=True)
    while all(server.poll() is None for server in servers):
        time.sleep(0.5)
    raise ServerError("a server has ended", where="logs/")


def _running_prefect() -> str | None:
    """Return the address of a running server: the one in the environment, or one that this file started."""
    address = os.environ.get("PREFECT_API_URL") or _recorded()
    return address if address and _responds(f"{address}/health") else None


def _recorded() -> str | None:
    if not PREFECT_TOML.is_file():
        return None
    return PREFECT_TOML.read_text().split('"')[1]


def _responds(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


def _check_free(port: int, variable: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            hint = f"stop the process that listens there, or choose another: {variable}={port + 1}"
            raise StageError("the port is taken", where=f"{HOST}:{port}", hint=hint) from None


def _port(variable: str, default: int) -> int:
    return int(os.environ.get(variable, default))


def _api(port: int) -> str:
    return f"http://{HOST}:{port}/api"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
