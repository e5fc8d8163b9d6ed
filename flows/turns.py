"""Checkouts of one configuration run a stage one after another: the first does the work, the next restore it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from prefect import get_run_logger
from prefect.context import FlowRunContext

from dllm.config.load import load_params, params_digest
from dllm.errors import StageError
from dllm.files import lock_folder
from dllm.process import signals
from dllm.stages import STAGES

WAIT_S = 5.0
"""Between two looks whether another run has finished."""


@contextlib.contextmanager
def turn(root: Path, stage: str) -> Iterator[None]:
    """Hold a stage of one configuration until DVC has saved its result; wait for the run that holds it.

    The lock of the stage itself is free before that, and the next would do the work once more.

    Args:
        root: the checkout.
        stage: the stage.
    """
    params = load_params(root / "params.yaml")
    upto = STAGES[: STAGES.index(stage) + 1]
    sections = [params.register_ if each == "register" else getattr(params, each) for each in upto]
    # In work/, which checkouts share, but for a run from scratch.
    folder = root / "work" / "turns" / f"{stage}-{params_digest(params.target, *sections)}"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(folder))
        except StageError:
            stack.enter_context(wait_until_free(stage, folder))
        yield


def wait_until_free(stage: str, folder: Path) -> contextlib.ExitStack:
    """Wait until no other process holds a folder; return its lock, held."""
    get_run_logger().info("%s: waiting for another run that works on the same: %s", stage, folder)
    stack = contextlib.ExitStack()
    while True:
        signals.sleep(WAIT_S)
        stop_if_suspended()
        with contextlib.suppress(StageError):
            with contextlib.suppress(OSError):  # somebody has removed it
                stack.enter_context(lock_folder(folder))
            return stack


def stop_if_suspended() -> None:
    """Raise Prefect's signal for a flow run that its user has suspended; the stage that runs is stopped by it."""
    if (context := FlowRunContext.get()) is not None:
        context.flow_run_suspension_request.raise_if_requested()
