"""Run the pipeline's servers on loopback until Ctrl-C: `ui` or `serve`.

While Prefect's server runs, `prefect.toml` in the project's folder has its address and its password, so that `prefect`
commands and `make run` find it, and two servers never share one database.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time

from mlflow.exceptions import MlflowException
from servers import (
    HOST,
    PASSWORD,
    PREFECT_TOML,
    ROOT,
    Service,
    close_flow_runs,
    gated,
    new_password,
    recorded_api,
    request,
    sole_owner,
    stop_all,
)

from dllm import secrets
from dllm.config.load import load_params
from dllm.errors import DllmError, ServerError, StageError
from dllm.process import children as process
from dllm.process import signals
from dllm.process.git_hooks import leave_hook
from dllm.process.output import outlive_readers
from dllm.process.proxies import bypass_for_loopback, drop_unusable
from dllm.secrets import hide
from dllm.tracking.address import is_local, page, sqlite_path, tracking_uri
from dllm.tracking.store import connect

MLFLOW_TOML = ROOT / "mlflow.toml"
DEPLOY = ROOT / "infra" / "deploy.py"
POOLS = {"local": 1, "checkouts": 2, "parts": 2}
"""Work pools, and how many flow runs this machine takes from each at a time. Runs in `local` share out/, where DVC and
the stages refuse a second one. Runs in `checkouts` and `parts` write to separate folders."""
WORKER_GRACE_S = 10.0
"""From SIGTERM to SIGKILL for a worker, its flow runs, and their stages."""
PAUSES_S = (1.0, 5.0, 20.0, 60.0)
"""Before a service that has ended is started again, for the first time, the second, and so on; then no more."""
HEALTHY_S = 600.0
"""After running for so long, a service that ends counts as ending for the first time."""
POLL_INTERVAL_S = 0.5
COMMAND_DEADLINE_S = 300.0


def main(what: str) -> int:
    """Start the servers, print their addresses, and run until a signal arrives; return the exit code."""
    started: list[Kept] = []
    with signals.handled(signal.SIGTERM, signal.SIGINT), contextlib.ExitStack() as held:
        outlive_readers()
        secrets.install()
        try:
            bypass_for_loopback()
            leave_hook()
            for variable in drop_unusable():
                say(f"warning: {variable} names a proxy that cannot be used here; going on without it")
            if what == "serve":
                held.enter_context(sole_owner())
            (serve if what == "serve" else ui)(started)
            keep(started)
        except DllmError as error:
            print(f"dllm: {error}", file=sys.stderr)
            return error.exit_code
        except SystemExit:
            say("stopped")
        finally:
            with signals.uninterrupted():
                stop_all([kept.service for kept in started if not kept.is_server])  # they report to the servers
                stop_all([kept.service for kept in started])
    return 0


class Kept:
    """A service, and how often it has ended."""

    def __init__(self, service: Service, is_server: bool) -> None:
        self.service, self.is_server = service, is_server
        self._ends = 0
        self._started = time.monotonic()
        self._due: float | None = None
        say(f"starting {service.name}")
        service.start()

    def start_again_if_ended(self) -> None:
        """Start the service again, after a pause, if it has ended.

        Raises:
            ServerError: it has ended too often.
        """
        now, name, log = time.monotonic(), self.service.name, f"logs/{self.service.name}.log"
        if self._due is not None and now >= self._due:
            self._due, self._started = None, now
            self.service.start()
        if self._due is None and self.service.ended:
            self._ends = 1 if now - self._started > HEALTHY_S else self._ends + 1
            if self._ends > len(PAUSES_S):
                raise ServerError(f"{name} has ended {self._ends} times", where=log, hint="its last lines say why")
            pause_s = PAUSES_S[self._ends - 1]
            say(f"{name} has ended; it is started again in {pause_s:g} s ({log})")
            self._due = now + pause_s


def ui(started: list[Kept]) -> None:
    """Start the web UIs of MLflow and Prefect."""
    mlflow_port, prefect_port = _port("MLFLOW_PORT", 5000), _port("PREFECT_PORT", 4200)
    uri, running = tracking_uri(ROOT), _running_prefect()
    if is_local(uri):
        _check_free(mlflow_port, "MLFLOW_PORT")
    if running is None:
        _check_free(prefect_port, "PREFECT_PORT")
    password = recorded_api().get("auth_string") or new_password()
    if is_local(uri):
        connect(uri, ROOT)  # MLflow's server would make its tables in place, and leave them half made when it is killed
        # Relative, since MLflow would take a quoted path for the name of a folder; in the environment, since every user
        # of the machine may read a command line.
        is_ours = sqlite_path(uri) == ROOT / "mlflow.db"
        os.environ["MLFLOW_BACKEND_STORE_URI"] = "sqlite:///mlflow.db" if is_ours else uri
        mlflow = Kept(gated("mlflow", mlflow_port, password, MLFLOW_TOML), is_server=True)
        started.append(mlflow)
    if running is None:
        running = _start_prefect(started, prefect_port, password)
    address = mlflow.service.wait_ready() if is_local(uri) else uri
    say(f"MLflow   {_way_in(_runs_page(uri, address), MLFLOW_TOML.name) if is_local(uri) else hide(address)}")
    say(f"Prefect  {_way_in(running.removesuffix('/api'), PREFECT_TOML.name)}")


def serve(started: list[Kept]) -> None:
    """Start a Prefect server, deploy the flows of prefect.yaml, and start their workers."""
    port = _port("PREFECT_PORT", 4200)
    _check_free(port, "PREFECT_PORT")
    if address := recorded_api().get("url"):
        hint = f"`make run` uses that server; stop its `make ui` or `make serve`, or remove {PREFECT_TOML.name}"
        raise StageError(f"{PREFECT_TOML.name} names a Prefect server already", where=str(address), hint=hint)
    password = new_password()
    api = _start_prefect(started, port, password)
    close_flow_runs(api, password)
    _deploy()
    for pool, limit in POOLS.items():
        argv = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
        often = {"PREFECT_WORKER_QUERY_SECONDS": "2"}
        worker = Service(f"prefect-worker-{pool}", [*argv, "--limit", str(limit)], often, grace_s=WORKER_GRACE_S)
        started.append(Kept(worker, is_server=False))
    say(f"Prefect  {_way_in(api.removesuffix('/api'), PREFECT_TOML.name)}")
    say("run      . infra/env.sh && prefect deployment run 'pipeline/project' --watch")
    say(f"logs     {', '.join(f'logs/prefect-worker-{pool}.log' for pool in POOLS)}")


def keep(started: list[Kept]) -> None:
    """Start again what ends, until a signal comes.

    Raises:
        ServerError: one has ended too often.
    """
    say("Ctrl-C stops it.")
    while True:
        for kept in started:
            kept.start_again_if_ended()
        signals.sleep(POLL_INTERVAL_S)


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def _start_prefect(started: list[Kept], port: int, password: str) -> str:
    server = Kept(gated("prefect", port, password, PREFECT_TOML), is_server=True)
    started.append(server)
    api = f"{server.service.wait_ready()}/api"
    os.environ |= {"PREFECT_API_URL": api, PASSWORD: password}
    return api


def _deploy() -> None:
    deployed = process.run([sys.executable, str(DEPLOY)], cwd=ROOT, deadline_s=COMMAND_DEADLINE_S)
    if deployed.code:
        said = " ".join(" ".join(deployed.tail).split()).removeprefix("dllm: ")[-300:]
        raise ServerError(f"cannot deploy the flows: {said}", where=os.environ["PREFECT_API_URL"])


def _way_in(address: str, file: str) -> str:
    return f"{address}   user and password are in {file}" if (ROOT / file).exists() else address


def _runs_page(uri: str, address: str) -> str:
    """Return the page with the runs of params.yaml's recipe, in the view for training: MLflow opens in another."""
    with contextlib.suppress(DllmError, MlflowException):
        recipe = load_params(ROOT / "params.yaml").recipe
        if (found := connect(uri, ROOT).get_experiment_by_name(recipe)) is not None:
            return page(address, str(found.experiment_id))
    return address


def _running_prefect() -> str | None:
    """Return the API's address of a running server: the one in the environment, or one that this file started."""
    recorded = recorded_api()
    address = os.environ.get("PREFECT_API_URL") or recorded.get("url")
    password = os.environ.get(PASSWORD) or recorded.get("auth_string")
    try:
        return address if address and request(f"{address}/health", password) else None
    except OSError:
        return None


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
