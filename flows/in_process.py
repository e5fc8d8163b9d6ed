"""Run a flow in this process, for `make run`: no server needed, one line for an error, an exit code."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from typing import Any

import prefect.context
from prefect import Flow, get_client
from prefect.exceptions import TerminationSignal
from prefect.settings import PREFECT_API_URL

from dllm.errors import DllmError, ServerError
from dllm.process.proxies import bypass_for_loopback, drop_unusable
from dllm.process.signals import exit_on
from infra.servers import PASSWORD, gated, new_password, recorded_api


def run(flow: Flow[Any, Any], **parameters: Any) -> int:
    """Run the flow on the configured Prefect server, or else a temporary one, and return its exit code."""
    began = time.monotonic()
    # Until the flow handles it: a process that SIGTERM ends leaves the temporary server behind.
    exit_on(signal.SIGTERM)
    try:
        _find_server()
        flow(**parameters)
    except DllmError as error:
        print(f"dllm: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, TerminationSignal) as stop:
        print(f"{flow.name}: stopped; the next call resumes from here", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    print(f"\n{flow.name}: finished in {time.monotonic() - began:.1f} s", flush=True)
    return 0


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
    password = new_password()
    server = gated("prefect", 0, password)
    atexit.register(server.stop)  # not before: Prefect sends its last logs when the interpreter ends
    os.environ["PREFECT_UI_ENABLED"] = "0"
    server.start()
    os.environ |= {"PREFECT_API_URL": f"{server.wait_ready()}/api", PASSWORD: password}
    prefect.context.refresh_global_settings_context()


def _check_server(address: str) -> None:
    with get_client(sync_client=True) as client:
        cause = client.api_healthcheck()
    if cause is not None:
        message = f"Prefect's server out of reach: {' '.join(str(cause).split())}"
        raise ServerError(message, where=address, hint="start it, unset PREFECT_API_URL, or delete prefect.toml")
