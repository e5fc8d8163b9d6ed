"""Run a flow in this process, for `make run`: no server needed, one line for an error, an exit code."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from prefect import Flow, get_client
from prefect.exceptions import TerminationSignal
from prefect.settings import PREFECT_API_URL

from dllm import secrets
from dllm.errors import DllmError, ServerError
from dllm.process.signals import exit_on


def run(flow: Flow[Any, Any], **parameters: Any) -> int:
    """Run the flow on the configured Prefect server, or else a temporary one, and return its exit code."""
    secrets.install()
    began = time.monotonic()
    # Until the flow handles it: a process that SIGTERM ends leaves the temporary server behind.
    exit_on(signal.SIGTERM)
    try:
        _check_server()
        flow(**parameters)
    except DllmError as error:
        print(f"dllm: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, TerminationSignal) as stop:
        print(f"{flow.name}: stopped; the next call resumes from here", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    print(f"\n{flow.name}: finished in {time.monotonic() - began:.1f} s", flush=True)
    return 0


def _check_server() -> None:
    address = PREFECT_API_URL.value()
    try:
        with get_client(sync_client=True) as client:
            cause = client.api_healthcheck()
    except RuntimeError as error:  # the temporary server did not start
        cause = error
    if cause is not None:
        where = address or "a temporary one, its data in PREFECT_HOME"
        hint = (
            "start it, unset PREFECT_API_URL, or delete prefect.toml"
            if address
            else "run again; see PREFECT_HOME for its database"
        )
        raise ServerError(f"Prefect's server out of reach: {' '.join(str(cause).split())}", where=where, hint=hint)
