"""Finished responses on disk, one line each, written as soon as they are finished.

Each response is one write of one line, so a killed process loses none of them. A line cut short by a full disk or a
power failure is removed when the journal is opened again, and generated again; so is one whose checksum is wrong.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from dllm.engines.defects import defect
from dllm.engines.engine import Response
from dllm.files import open_to_append

SYNC_EVERY_S = 5.0
"""A power failure loses the responses of at most so many seconds."""

_log = logging.getLogger(__name__)


class ResponseJournal:
    """An append-only file of responses, read by key; the first response to a key counts.

    Raises:
        StageError: a link stands in place of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._file = open_to_append(path)
        self._end = self._scan()
        self._synced = time.monotonic()

    def __enter__(self) -> ResponseJournal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def append(self, response: Response) -> None:
        """Write one response; a second one to a key is ignored.

        Raises:
            OSError: the disk is full or failed; what was written before stays readable.
        """
        if response.key in self._places:
            return
        fields: list[object] = [response.key, response.token_ids, response.text, response.finish_reason]
        if response.tool_calls:
            fields.append(response.tool_calls)
        data = json.dumps(fields).encode()
        line = data + b"\t%08x\n" % zlib.crc32(data)
        written = 0
        while written < len(line):
            written += os.write(self._file, line[written:])
        self._index(response.key, len(line))
        if time.monotonic() - self._synced > SYNC_EVERY_S:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def read(self, key: str) -> Response:
        """Read the response to a key that is held."""
        start, length = self._places[key]
        return _parse(os.pread(self._file, length, start))

    def forget(self, key: str) -> None:
        """Take the response to a key for missing: another may be written."""
        del self._places[key]

    def _index(self, key: str, length: int) -> None:
        self._places[key] = (self._end, length)
        self._end += length

    def _scan(self) -> int:
        self._end = damaged = 0
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file, self._end)
                    break
                try:
                    response = _parse(line)
                except (ValueError, TypeError, RecursionError):
                    damaged += 1
                    self._end += len(line)
                    continue
                self._index(response.key, len(line))  # of two lines the last: the first was forgotten
        if damaged:
            _log.warning("%s: %d damaged lines left out; those responses are generated again", self.path, damaged)
        return self._end


def read(path: Path) -> Iterator[Response]:
    """Read the whole responses of a journal, of two to a key the last; nothing is changed."""
    responses: dict[str, Response] = {}
    with path.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                response = _parse(line)
                responses[response.key] = response
    yield from responses.values()


def count_damaged(path: Path) -> int:
    """Count the lines of a journal that hold no response as it was written; nothing is changed."""
    damaged = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                _parse(line)
            except (ValueError, TypeError, RecursionError):
                damaged += line.endswith(b"\n")  # what a kill has cut short is no damage
    return damaged


def _parse(line: bytes) -> Response:
    """Read one line.

    Raises:
        ValueError: it holds no response, or one with a defect, or is damaged.
    """
    data, tab, found = line.rstrip(b"\n").partition(b"\t")  # lines of older versions have no checksum
    if tab and found != b"%08x" % zlib.crc32(data):
        raise ValueError("its checksum is another")
    key, token_ids, text, finish_reason, *calls = json.loads(data)
    response = Response(key, tuple(token_ids), text, finish_reason, *map(tuple, calls))
    if (reason := defect(response)) is not None:
        raise ValueError(reason)
    return response
