"""Finished answers on disk, one line each, from the moment they are finished.

Owns what a kill leaves behind. Every answer is one write of one line, so a killed process loses none that it had; a
line cut short by a full disk or a power failure is taken off when the journal is opened again, and asked anew.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from types import TracebackType

from dllm.engines.engine import Response

SYNC_EVERY_S = 5.0
"""A power failure loses at most so many seconds of answers."""

_log = logging.getLogger(__name__)


class ResponseJournal:
    """An append-only file of answers, read by key; the first answer to a key is the one that counts.

    Units: `num_tokens` counts the ids of all answers held.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_tokens = 0
        self._places: dict[str, tuple[int, int]] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._end = self._scan()
        self._synced = time.monotonic()

    def __enter__(self) -> ResponseJournal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def append(self, answer: Response) -> None:
        """Write one answer down; an answer to a key that is already held is ignored.

        Raises:
            OSError: the disk is full or failed; what was written before stays readable.
        """
        if answer.key in self._places:
            return
        said: list[object] = [answer.key, answer.token_ids, answer.text, answer.finish_reason]
        if answer.tool_calls:
            said.append(answer.tool_calls)
        line = json.dumps(said).encode() + b"\n"
        written = 0
        while written < len(line):
            written += os.write(self._file, line[written:])
        self._note(answer.key, len(line), len(answer.token_ids))
        if time.monotonic() - self._synced > SYNC_EVERY_S:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def read(self, key: str) -> Response:
        """Read the answer to a key that is held."""
        start, length = self._places[key]
        return _parse(os.pread(self._file, length, start))

    def _note(self, key: str, length: int, num_tokens: int) -> None:
        self._places[key] = (self._end, length)
        self._end += length
        self.num_tokens += num_tokens

    def _scan(self) -> int:
        self._end = damaged = 0
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file, self._end)
                    break
                try:
                    answer = _parse(line)
                except (ValueError, TypeError):
                    damaged += 1
                    self._end += len(line)
                    continue
                if answer.key in self._places:
                    self._end += len(line)
                else:
                    self._note(answer.key, len(line), len(answer.token_ids))
        if damaged:
            _log.warning("%s: %d damaged lines left out; those prompts are asked again", self.path, damaged)
        return self._end


def _parse(line: bytes) -> Response:
    key, token_ids, text, finish_reason, *calls = json.loads(line)
    return Response(key, tuple(token_ids), text, finish_reason, *map(tuple, calls))
