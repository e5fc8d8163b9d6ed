"""Readers of parquet, JSON and JSON Lines files: rows, each with its file and line, and errors for damaged files."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dllm.errors import DataError

Record = tuple[str, Any]
"""The place of a row (`file:line`), and the row."""

SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz")


def records(path: Path) -> Iterator[Record]:
    """Read the rows of a file by its suffix; a `.json` file may hold one list or one row a line.

    Raises:
        DataError: the file or one of its lines cannot be read.
    """
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".json" and _opens_a_list(path):
        return _json_list(path)
    return json_lines(path)


def json_lines(path: Path) -> Iterator[Record]:
    """Read one JSON value a line; blank lines are skipped.

    Raises:
        DataError: a line is not UTF-8 or not JSON, or the gzip file is damaged; it names file and line.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield f"{path}:{number}", json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}", where=f"{path}:{number}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason} at byte {error.start + 1}", where=f"{path}:{number}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read the file: {error}", where=f"{path}:{number + 1}") from None


def _opens_a_list(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except OSError:
        return False  # json_lines raises the same error with its place


def _json_list(path: Path) -> Iterator[Record]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"cannot read the file: {error}", where=str(path)) from None
    for number, value in enumerate(values, 1):
        yield f"{path} item {number}", value


def _parquet(path: Path) -> Iterator[Record]:
    # pyarrow takes 0.2 seconds to import; built-in sources are JSON lines.
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"cannot read the parquet file: {reason}", where=f"{path} row {number + 1}") from None
