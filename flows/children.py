"""Child processes of a flow, `dvc repro` for a stage or a verb: output shown and logged, a progress bar, no orphans."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from prefect import get_run_logger
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run

from dllm import secrets
from dllm.errors import DllmError, ServerError, StageError
from dllm.files import lock_folder
from dllm.process import children as process
from dllm.process.output import outlive_readers
from dllm.progress import Lines
from dllm.stages import STAGES
from dllm.stages import workspace as contract
from flows import turns
from flows.artifacts import ProgressBar, share

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Place:
    """A folder that stages run in."""

    root: Path
    logs: Path
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of the stages."""


HERE = Place(ROOT, ROOT / "logs")
"""The project's folder."""
DEADLINE_S = 7 * 24 * 3600.0
"""No stage takes this long: a hung one is stopped and frees its slot."""
STATUS_DEADLINE_S = 300.0
RECORD_EVERY_S = 5.0
DVC_CHATTER = re.compile(
    r"\s*$|To track the changes|To enable auto|\s+git add|\s+dvc config|Use `dvc push`|\w+ lock file "
    r"|WARNING: Process .* RWLock"  # the stale lock of a killed run; DVC has removed it
    r"|ERROR: .*it is being blocked by:|  \(PID \d+\): |If there are no processes with such PIDs"  # one line instead
)
BUSY = re.compile(r"another process works on this \(pid \w+\) \((.+)\); ")
HOLDER = re.compile(r"  \(PID (\d+)\): (.*)")
PROGRESS = re.compile(r"^[\w :-]+: \d\S*( \w+( \(\d+%\))?)?  \S+ \w+/s\b|\d%\|")
"""Lines of `dllm.progress.Progress`, and of tqdm, which libraries use."""
COMPLAINT = re.compile(r"dllm( rank \d+)?: |ERROR: |(?='.+' (is invalid|validation failed))")
"""What begins a line that says why: a stage's, DVC's, and DVC's of a dvc.yaml or dvc.lock that it cannot read."""
FAILURE = re.compile(r"dllm( rank \d+)?: |ERROR: |Traceback \(most recent call last\)|[\w.]+(Error|Exception)\b(:|$)")
WARNING = re.compile(r"(?i:warning\b)|.*\w*Warning: ")
STAGE_CODE = re.compile(r"exited with (\d+)")


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold the project's pipeline: one flow at a time works on out/.

    Raises:
        StageError: another flow holds it; its process is named.
    """
    (root / "work").mkdir(exist_ok=True)
    with lock_folder(root / "work"):
        yield


def reproduce(place: Place, stage: str, force: bool = False) -> None:
    """Run one stage through DVC, if it is out of date.

    Args:
        place: where.
        stage: the stage.
        force: run it even if DVC considers it up to date.

    Raises:
        ServerError: the stage could not reach a server.
        StageError: it failed otherwise; the message is the stage's error line.
    """
    argv = ["dvc", "--wait-for-lock", "repro", "--single-item", stage]
    _run_in_turn(place, stage, [sys.executable, "-m", *argv, *(["--force"] if force else [])])


def out_of_date(place: Place, stage: str) -> str:
    """Say what DVC finds changed since it saved a stage's result; an empty text where that is nothing."""
    argv = [sys.executable, "-m", "dvc", "status", "--json", stage]
    result = process.run(argv, cwd=place.root, deadline_s=STATUS_DEADLINE_S)
    line = next((each for each in result.tail if each.startswith("{")), None)  # beside warnings
    if result.code or line is None:
        return ""
    found = json.loads(line).get(stage, [])
    changed: dict[str, Any] = {}
    for each in found:
        for files in each.values() if isinstance(each, dict) else ():
            changed |= files
    named = [f"{path} ({', '.join([what] if isinstance(what, str) else what)})" for path, what in changed.items()]
    return f"DVC finds changes: {', '.join(named)}"[:300] if named else ""


def run_verb(place: Place, *words: str, name: str | None = None) -> None:
    """Run a verb of `python -m dllm` with its arguments; raises as `reproduce` does.

    Args:
        place: where.
        words: the verb and its arguments.
        name: name of its log and its progress bar; None takes the verb.
    """
    _run_in_turn(place, name or words[0], [sys.executable, "-m", "dllm", *words])


class Retries(TypedDict):
    """How a task is retried."""

    retries: int
    retry_delay_seconds: list[float]
    retry_condition_fn: Callable[[Any, TaskRun, State[Any]], bool]


def out_of_reach(_: object, run: TaskRun, state: State[Any]) -> bool:
    """Retry only what may pass with time: a server out of reach."""
    return isinstance(state.result(raise_on_failure=False), ServerError)


WHEN_A_SERVER_IS_BACK: Retries = {
    "retries": 3,
    "retry_delay_seconds": [10, 60, 300],
    "retry_condition_fn": out_of_reach,
}
"""For tasks that resume from finished work."""


def _run_in_turn(place: Place, stage: str, argv: Sequence[str]) -> None:
    if place is HERE or stage not in STAGES:
        return _run(place, stage, argv)
    with turns.turn(place.root, stage):
        while True:
            try:
                return _run(place, stage, argv)
            except _Busy as busy:  # a run in the project's folder, say: what it has finished is restored
                turns.wait_until_free(stage, busy.folder).close()


def _run(place: Place, stage: str, argv: Sequence[str]) -> None:
    log_file = place.logs / f"{stage}.log"
    environment = {
        **place.env,
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        "DLLM_FLOW_RUN": str(flow_run.id or ""),
    }
    outlive_readers()  # the worker that reads this may be killed
    secrets.install()  # a worker's flow run enters here
    relay = _Relay(stage, waits=place is not HERE)
    try:
        result = process.run(argv, env=environment, cwd=place.root, deadline_s=DEADLINE_S, log=relay, log_file=log_file)
    finally:  # after SIGKILL (cancelled, out of memory) the MLflow run of the stage is still open
        with contextlib.suppress(DllmError, OSError):  # a store that cannot be used fails no stage
            contract.close(ROOT)
        relay.lines.end()
    relay.bar.catch_up()
    get_run_logger().info("%s: exit code %d after %.1f s", stage, result.code, result.seconds)
    if result.code == 0:
        return
    _report_holder(place.root, result.tail)
    reason = first_complaint(result.tail) or f"exit code {result.code}"
    codes = [int(match[1]) for line in result.tail if (match := STAGE_CODE.search(line))]  # dvc's own is always 255
    if "is not a git repository" in reason:
        raise StageError(
            "DVC looks for git here", where=str(place.root), hint="outside git: `dvc config core.no_scm true`"
        )
    kind = ServerError if ServerError.exit_code in [result.code, *codes] else StageError
    error = kind(f"stage {stage} failed: {reason}", where=str(log_file.relative_to(ROOT)))
    raise _Busy(error, Path(busy[1])) if (busy := BUSY.match(reason)) else error


def first_complaint(lines: Sequence[str]) -> str | None:
    """Return the first line that says why a stage failed, without what marks it; None where none does."""
    found = next(filter(COMPLAINT.match, lines), None)
    return None if found is None else COMPLAINT.sub("", found, count=1)


class _Busy(StageError):
    """Another process works on the same configuration of a stage, in `folder`."""

    def __init__(self, error: DllmError, folder: Path) -> None:
        super().__init__(error.message, where=error.where, hint=error.hint)
        self.folder = folder


def _report_holder(root: Path, lines: Sequence[str]) -> None:
    """Raise for a lock of DVC that another process holds; DVC spreads it over lines, and advises to delete the lock."""
    if any(line.endswith("it is being blocked by:") for line in lines):
        holders = [f"pid {match[1]}: {match[2]}" for line in lines if (match := HOLDER.match(line))]
        held = f"another process works on this ({', '.join(holders) or 'pid unknown'})"
        raise StageError(held, where=str(root), hint="wait for it, or stop it")


class _Relay:
    """Shows every line and logs it to the flow run; of progress, one line every few seconds and the last."""

    def __init__(self, stage: str, waits: bool) -> None:
        self._waits = waits
        """Whether the flow waits where another process works on the same: no error then."""
        self._is_busy = False
        self.bar = ProgressBar(f"{stage}-progress")
        self._logger = get_run_logger()
        self._recorded = 0.0
        self.lines = Lines()
        print(f"\n== {stage} ==", flush=True)

    def __call__(self, line: str) -> None:
        self._record(line)
        turns.stop_if_suspended()

    def _record(self, line: str) -> None:
        if DVC_CHATTER.match(line):
            return
        is_progress = bool(PROGRESS.search(line))
        self.lines.show(line, is_progress=is_progress)
        self.bar.show(line)
        if is_progress and share(line) != 1:
            if time.monotonic() - self._recorded < RECORD_EVERY_S:
                return
            self._recorded = time.monotonic()
        self._is_busy = self._is_busy or (self._waits and BUSY.search(line) is not None)
        self._logger.log(logging.INFO if self._is_busy else level(line), "%s", line)


def level(line: str) -> int:
    """Return the level at which a stage's line is logged."""
    if FAILURE.match(line):
        return logging.ERROR
    return logging.WARNING if WARNING.match(line) else logging.INFO
