"""Start servers and workers in the background: each under a supervisor, with a log, found by its clients.

Nothing here outlives the process that started it, also after a `kill -9`: `dllm/process/supervisor.py` sees to it.
Servers run behind `infra/gate.py`, which asks for a password and refuses web pages.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import secrets
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dllm.errors import ServerError, StageError
from dllm.files import lock_folder
from dllm.process import children as process
from dllm.process import signals
from dllm.secrets import remember

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
GATE = ROOT / "infra" / "gate.py"
PREFECT_TOML = ROOT / "prefect.toml"
PASSWORD = "PREFECT_API_AUTH_STRING"
"""Prefect's own variable for `user:password`; the gate and its clients read it."""
HEADER = "# Written by infra/gate.py while its server listens."
"""The start of a client file."""
READY = "listening at "
"""The start of the line that a server prints once it listens; the address follows."""
COMPLAINT = "dllm: "
READY_S = 300.0
REQUEST_S = 30.0
POLL_INTERVAL_S = 0.1


class Service:
    """A server or a worker that runs in the background, its output in logs/NAME.log.

    Args:
        name: its name.
        argv: the program and its arguments.
        env: variables added to this process's environment.
        grace_s: from SIGTERM to SIGKILL.
    """

    def __init__(
        self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None, grace_s: float = 5.0
    ) -> None:
        self.name, self.log = name, ROOT / "logs" / f"{name}.log"
        self._argv, self._env, self._grace_s = argv, dict(env or {}), grace_s
        self._stack = contextlib.ExitStack()
        self._child: process.Background | None = None
        self._seen = 0
        self.log.parent.mkdir(exist_ok=True)
        self.log.write_bytes(b"")

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._child is None or self._child.ended

    def start(self) -> None:
        """Start it, again after it has ended."""
        self.stop()
        self._seen = self.log.stat().st_size
        # It writes to the file itself: a pipe would break when this process is killed, amid what it then has to say.
        to_log = ["sh", "-c", 'exec "$@" >>"$0" 2>&1', str(self.log)]
        self._child = self._stack.enter_context(
            process.background([*to_log, *self._argv], env=self._env, cwd=ROOT, grace_s=self._grace_s)
        )

    def stop(self) -> None:
        """Stop it and all processes below it."""
        self._stack.close()

    def wait_ready(self) -> str:
        """Wait until a server listens, and return its address.

        Raises:
            ServerError: it ended, or did not listen in time.
        """
        end = time.monotonic() + READY_S
        while not self.ended and time.monotonic() < end:
            for line in self.log.read_bytes()[self._seen :].decode(errors="replace").splitlines(keepends=True):
                if line.startswith(READY) and line.endswith("\n"):
                    return line.removeprefix(READY).strip()
            signals.sleep(POLL_INTERVAL_S)
        lines = self.log.read_text(errors="replace").splitlines()
        cause = next((f": {line.removeprefix(COMPLAINT)}" for line in lines if line.startswith(COMPLAINT)), "")
        raise ServerError(f"{self.name} did not start{cause}", where=f"logs/{self.name}.log")


def stop_all(services: Sequence[Service]) -> None:
    """Stop services at the same time."""
    with ThreadPoolExecutor(max(1, len(services))) as pool:
        list(pool.map(Service.stop, services))


def gated(what: str, port: int, password: str, client_file: Path | None = None) -> Service:
    """Return a server behind the gate, not yet started.

    Args:
        what: `prefect` or `mlflow`.
        port: where it listens; 0 takes a free one.
        password: `user:password`.
        client_file: has the address and the password while it listens.
    """
    argv = [sys.executable, str(GATE), what, str(port), *([str(client_file)] if client_file else [])]
    return Service(f"{what}-server", argv, {PASSWORD: password})


def new_password() -> str:
    """Make a password for a server, as `user:password`; PREFECT_API_AUTH_STRING names one to use instead."""
    return os.environ.get(PASSWORD) or f"dllm:{secrets.token_urlsafe(18)}"


def recorded_api() -> dict[str, Any]:
    """Read prefect.toml: `url` and `auth_string` of the server that listens; empty where there is none.

    A file that a killed server has left behind is removed.
    """
    try:
        with PREFECT_TOML.open("rb") as stream:
            text = stream.read().decode()
            if text.startswith(HEADER) and _nobody_locks(stream.fileno()):
                PREFECT_TOML.unlink()
                return {}
        api = dict(tomllib.loads(text).get("api", {}))
        remember(str(api.get("auth_string", "")))
        return api
    except (OSError, ValueError):
        return {}


def request(address: str, password: str | None, body: object = None) -> Any:
    """Send a request to a server, POST where it has a body, and return the JSON of the response.

    Raises:
        OSError: no response, or one that is no JSON or reports an error.
    """
    call = urllib.request.Request(address, None if body is None else json.dumps(body).encode())
    call.add_header("Content-Type", "application/json")
    if password:
        call.add_header("Authorization", "Basic " + base64.b64encode(password.encode()).decode())
    try:
        with urllib.request.urlopen(call, timeout=REQUEST_S) as response:
            return json.load(response)
    except ValueError as error:
        raise OSError(f"no JSON: {error}") from None


@contextlib.contextmanager
def sole_owner() -> Iterator[None]:
    """Hold Prefect's database, for a server that closes what an earlier one has left: of those there is one at a time.

    Raises:
        StageError: a `make run` or `make serve` holds it; its process is named.
    """
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(home))
        except StageError as error:
            hint = "wait until that `make run` or `make serve` has ended; a run started while `make serve` runs uses it"
            raise StageError(f"Prefect's database is in use: {error.message}", where=str(home), hint=hint) from None
        yield


def close_flow_runs(api: str, password: str) -> None:
    """Mark as crashed what a server that has just started finds running: it was killed, and holds slots of its pool."""
    states = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}
    crashed = {"state": {"type": "CRASHED", "message": "killed; the next run resumes"}, "force": True}
    with contextlib.suppress(OSError):
        for run in request(f"{api}/flow_runs/filter", password, {"flow_runs": {"state": states}}):
            request(f"{api}/flow_runs/{run['id']}/set_state", password, crashed)


def _nobody_locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
