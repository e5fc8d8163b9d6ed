"""Running a flow in this very process, for `make run`: one line for an error, an exit code, and no second server."""

from __future__ import annotations

import sys
import time
from typing import Any

from prefect import Flow
from prefect.exceptions import TerminationSignal

from dllm.errors import DllmError


def run(flow: Flow[Any, Any], **parameters: Any) -> int:
    """Run the flow and return the exit code to leave with."""
    began = time.monotonic()
    try:
        flow(**parameters)
    except DllmError as error:
        print(f"dllm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except TerminationSignal:
        return 143
    print(f"\n{flow.name}: finished in {time.monotonic() - began:.1f} s", flush=True)
    return 0
