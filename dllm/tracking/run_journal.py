"""What was logged to one MLflow run, on disk: the truth that MLflow follows, however often it is away.

One file per run, `work/tracking/<run id>.jsonl`: what was logged, line by line, and among it how many of these lines
the store has taken. A line is written before it is sent, and the count after, so only what was under way when a process
was killed is in doubt. The file goes once the run has ended, all of it is in the store, and nothing resumes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dllm.errors import StageError
from dllm.files import open_to_append
from dllm.secrets import hide_in

PATIENCE_S = 120.0
FOLDER = Path("work", "tracking")
OPEN = (None, "RUNNING")
"""Statuses of a run that has not ended."""

_KINDS: dict[str, Callable[[Any], bool]] = {
    "head": lambda value: isinstance(value, dict) and all(isinstance(each, str) for each in value.values()),
    "taken": lambda value: isinstance(value, int) and value >= 0,
    "metrics": lambda value: isinstance(value, dict) and all(isinstance(each, int | float) for each in value.values()),
    "step": lambda value: isinstance(value, int),
    "params": lambda value: isinstance(value, dict),
    "tags": lambda value: isinstance(value, dict),
    "inputs": lambda value: isinstance(value, list) and all(isinstance(each, dict) for each in value),
    "artifact": lambda value: isinstance(value, str) and ".." not in value and not value.startswith("/"),
    "status": lambda value: isinstance(value, str),
    "time": lambda value: isinstance(value, int),
}
"""What each key of a line holds."""

Record = dict[str, Any]
"""One of `metrics` (with `step`), `params`, `tags`, `inputs` (datasets), `artifact` (with `folder`) or `status`, each
with its `time` in ms."""


class RunJournal:
    """The journal of one run, open and locked.

    Args:
        path: the file; made where there is none.

    Raises:
        BlockingIOError: another process has it open.
        StageError: a link stands in place of the file.
    """

    head: Record
    """Where the run is: its store, stage and work folder."""
    pending: list[Record]
    """What the store has not taken yet, oldest first."""
    in_doubt: bool
    """Whether the store may have taken some of it."""
    status: str | None
    """Latest status."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.run_id = path.stem
        self._file = os.fdopen(open_to_append(path), "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.read()
        except BaseException:
            self._file.close()
            raise

    @classmethod
    def wait_for(cls, path: Path) -> RunJournal:
        """Open a journal, once a process that sends its records has closed it.

        Raises:
            StageError: it has been open elsewhere for minutes.
        """
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return cls(path)
            except BlockingIOError:
                if time.monotonic() > end:
                    hint = "stop the process that has it open (`fuser` names it), then run again"
                    raise StageError("another process writes to this MLflow run", where=str(path), hint=hint) from None
            time.sleep(0.1)

    def begin(self, **head: str) -> None:
        """Record where the run is."""
        self.head = dict(head)
        self._write_line({"head": self.head})

    def add(self, **record: Any) -> None:
        """Append a record; what the journal has already, points of metrics and parameters, is left out of it."""
        if "metrics" in record:
            step = record["step"]
            new = {key: value for key, value in record["metrics"].items() if (key, step) not in self._points}
            record["metrics"] = new
        if "params" in record:
            new = {key: value for key, value in record["params"].items() if key not in self._params}
            record["params"] = new
        if record.get("metrics", record.get("params", True)):
            line = hide_in({**record, "time": int(time.time() * 1000)})
            self._write_line(line)
            self._take_in(line)

    def keep_file(self, path: Path, folder: str | None, **beside: str) -> None:
        """Append a file: a copy of it, since the original may change before the store takes it."""
        place = self.path.with_suffix("") / str(self._written)
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place / path.name)
        self.add(artifact=f"{self._written}/{path.name}", folder=folder, **beside)

    def file_of(self, record: Record) -> Path:
        """Return the copy that an artifact's record names."""
        return self.path.with_suffix("") / str(record["artifact"])

    def took(self, count: int) -> None:
        """Record that the store has taken the oldest pending records."""
        for record in self.pending[:count]:
            if "artifact" in record:
                shutil.rmtree(self.file_of(record).parent, ignore_errors=True)
        del self.pending[:count]
        self._taken += count
        with contextlib.suppress(OSError):  # a full disk: they are in doubt at the next start
            self._write_line({"taken": self._taken})

    def next_step(self, prefix: str) -> int:
        """Return the step after the last one of the metrics whose names start with a prefix."""
        return max((step + 1 for key, step in self._points if key.startswith(prefix)), default=0)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._file.closed

    def close(self) -> None:
        """Release the file; remove it where the run has ended, is in the store, and nothing resumes it."""
        can_resume = self.status != "FINISHED" and Path(self.head.get("work", "")).is_dir()
        if self.status not in OPEN and not self.pending and not can_resume:
            self.remove()
        self._file.close()

    def remove(self) -> None:
        """Remove the file and the copies beside it."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.path.with_suffix(""), ignore_errors=True)

    def read(self) -> None:
        """Read the file again: a signal that raises may have struck between a line and its note in memory."""
        self.head, self.pending, self.status = {}, [], None
        self._written = self._taken = 0
        self._points: set[tuple[str, int]] = set()
        self._params: set[str] = set()
        for line in self._lines():
            if "head" in line:
                self.head = line["head"]
            elif "taken" in line:
                self._taken = line["taken"]
            else:
                self._take_in(line)
        del self.pending[: self._taken]
        self.in_doubt = bool(self.pending)

    def records(self) -> list[Record]:
        """Read everything that was logged, taken or not."""
        return [line for line in self._lines() if "head" not in line and "taken" not in line]

    def _lines(self) -> list[Record]:
        self._file.seek(0)
        whole = self._file.read()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):  # cut short by a kill
            self._file.truncate(end)
        return [line for line in map(_parse, whole[:end].splitlines()) if line]

    def _take_in(self, record: Record) -> None:
        self._written += 1
        self.pending.append(record)
        self._points.update((key, record["step"]) for key in record.get("metrics", ()))
        self._params.update(record.get("params", ()))
        self.status = record.get("status", self.status)

    def _write_line(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(line) + "\n").encode()
        file = self._file.fileno()
        before = os.fstat(file).st_size
        try:
            while data:
                data = data[os.write(file, data) :]
        except OSError:  # the disk is full
            os.ftruncate(file, before)
            raise


def journals(root: Path) -> Iterator[RunJournal]:
    """Open each journal of a project that no living process has open; close it after the caller's turn."""
    for path in sorted((root / FOLDER).glob("*.jsonl")):
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            journal = RunJournal(path)
            try:
                yield journal
            finally:
                journal.close()


def is_behind(root: Path) -> bool:
    """Return whether a run of a project has records that no living process will send."""
    return any(bool(journal.pending) or journal.status in OPEN for journal in journals(root))


def journal_path(root: Path, run_id: str) -> Path:
    """Return the file of a run's journal."""
    return root / FOLDER / f"{run_id}.jsonl"


def is_open(path: Path) -> bool:
    """Return whether a process has a journal open."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _parse(text: bytes) -> Record:
    """Read a line; empty where it is none that this file writes."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    is_right = isinstance(line, dict) and all(check(line[key]) for key, check in _KINDS.items() if key in line)
    return line if is_right and ("step" in line or "metrics" not in line) else {}
