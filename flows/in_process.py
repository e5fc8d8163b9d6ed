"""Run a flow in this process, for `make run`: no server needed, one line for an error, an exit code."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import prefect.context
from prefect import Flow, get_client
from prefect.settings import PREFECT_API_URL

from dllm import secrets
from dllm.errors import DllmError, ServerError
from dllm.process import children, signals
from dllm.process.git_hooks import leave_hook
from dllm.process.output import open_closed, outlive_readers
from dllm.process.parent import follow_parent
from dllm.process.proxies import bypass_for_loopback, drop_unusable
from infra.servers import PASSWORD, close_flow_runs, gated, new_password, recorded_api, sole_owner

STOP_S = 5.0
"""How long Prefect may take, after a signal and when no child runs, to return; it may be waiting to retry."""
POLL_INTERVAL_S = 0.2


def run(flow: Flow[Any, Any], check: Callable[[], object] | None = None, **parameters: Any) -> int:
    """Run the flow on the configured Prefect server, or else a temporary one, and return its exit code.

    Args:
        flow: the flow.
        check: raises what is wrong before a server is started.
        parameters: of the flow.
    """
    began = time.monotonic()
    open_closed()
    with signals.handled(signal.SIGTERM, signal.SIGINT):
        follow_parent()
        outlive_readers()
        leave_hook()
        secrets.install()  # last, around the stream that outlives its reader
        try:
            if check is not None:
                check()
            _find_server()
            _run_in_thread(flow, parameters)
        except DllmError as error:
            print(f"dllm: {error}", file=sys.stderr)
            return error.exit_code
        except SystemExit as stop:
            print(f"{flow.name}: stopped; the next call resumes from here", file=sys.stderr)
            return int(stop.code or 0)
    print(f"\n{flow.name}: finished in {time.monotonic() - began:.1f} s", flush=True)
    return 0


def _run_in_thread(flow: Flow[Any, Any], parameters: dict[str, Any]) -> None:
    """Run the flow beside the main thread, where Prefect's own handler would raise wherever a signal strikes.

    Raises what the flow raises. After a signal the child that runs is stopped, and no further one starts.
    """
    raised: list[BaseException] = []

    def work() -> None:
        try:
            flow(**parameters)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name=flow.name, daemon=True)
    with signals.Interrupt():
        thread.start()
        idle_since = time.monotonic()
        while thread.is_alive() and time.monotonic() - idle_since < STOP_S:
            thread.join(POLL_INTERVAL_S)
            if signals.received() is None or children.is_running():
                idle_since = time.monotonic()
    if (number := signals.received()) is not None:
        raise SystemExit(128 + number)
    if raised:
        raise raised[0]


def _find_server() -> None:
    """Check the configured server, or start one for this process: on loopback, with a password, as `make serve` has."""
    bypass_for_loopback()
    for variable in drop_unusable():
        print(f"warning: {variable} names a proxy that cannot be used here; going on without it", file=sys.stderr)
    recorded_api()  # removes a prefect.toml that points to nothing
    prefect.context.refresh_global_settings_context()
    if address := PREFECT_API_URL.value():
        _check_server(address)
        return
    held = contextlib.ExitStack()
    held.enter_context(sole_owner())
    atexit.register(held.close)
    password = new_password()
    server = gated("prefect", 0, password)
    atexit.register(server.stop)  # not before: Prefect sends its last logs when the interpreter ends
    os.environ["PREFECT_UI_ENABLED"] = "0"
    server.start()
    api = f"{server.wait_ready()}/api"
    close_flow_runs(api, password)
    os.environ |= {"PREFECT_API_URL": api, PASSWORD: password}
    prefect.context.refresh_global_settings_context()


def _check_server(address: str) -> None:
    with get_client(sync_client=True) as client:
        cause = client.api_healthcheck()
    if cause is not None:
        message = f"Prefect's server out of reach: {' '.join(str(cause).split())}"
        raise ServerError(message, where=address, hint="start it, unset PREFECT_API_URL, or delete prefect.toml")
