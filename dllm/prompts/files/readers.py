"""Readers of JSON Lines, JSON, parquet and Arrow files: rows, each with its file and line.

A line that cannot be read is a `BadRow` among the others; a file that is damaged as a whole is an error.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from dllm.errors import DataError
from dllm.outside import JsonError, one_line, parse_json


class BadRow(NamedTuple):
    """A row that cannot be read, in place of it."""

    reason: str


Record = tuple[str, Any]
"""The place of a row (`file:line`), and the row or a `BadRow`."""

TABLES = (".parquet", ".arrow", ".feather")
LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
KINDS = ".parquet, .arrow, .jsonl, .ndjson or .json, the last three also with .gz, .zst, .bz2 or .xz"
"""Files that are read, for error messages."""


def kind_of(name: str) -> str | None:
    """Return the kind of a file by its name, in whatever case: a suffix of TABLES or LINES, `.json`, or None."""
    name = name.lower()
    for suffix in COMPRESSED:
        if name.endswith(suffix):
            inner = kind_of(name.removesuffix(suffix))
            return None if inner in TABLES else inner
    return next((suffix for suffix in (*TABLES, *LINES, ".json") if name.endswith(suffix)), None)


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """Read the rows of a file that has no bad rows, such as one of a package; see `all_records`.

    Raises:
        DataError: the file is damaged, or one of its rows is.
    """
    for place, row in all_records(path):
        if isinstance(row, BadRow):
            raise DataError(row.reason, where=place)
        yield place, row


def all_records(path: Path) -> Iterator[Record]:
    """Read the rows of a file by its name; a `.json` file may hold a list, one object, or one row per line.

    Raises:
        DataError: the file is damaged, or is not what its name says.
    """
    kind = kind_of(path.name)
    _check_kind(path)
    if kind in TABLES:
        return _table(path, kind)
    if kind == ".json" and not _is_lines(path):
        return _json_document(path)
    return _json_lines(path)


_WIDE = {
    "UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"),
    "UTF-32LE": (b"{\0\0\0", b"[\0\0\0"),
    "UTF-32BE": (b"\0\0\0{", b"\0\0\0["),
    "UTF-16": (b"\xff\xfe", b"\xfe\xff"),
    "UTF-16LE": (b"{\0", b"[\0"),
    "UTF-16BE": (b"\0{", b"\0["),
}
"""What files of JSON begin with in encodings that are not read: a byte order mark, or the first character."""
_BEGINS: dict[bytes, tuple[str, str | None]] = {
    b"PAR1": ("a parquet file", ".parquet"),
    b"PARE": ("a parquet file that is encrypted", None),
    b"ARROW1": ("an Arrow file", ".arrow"),
    b"FEA1": ("a Feather file of version 1", None),
    b"\x1f\x8b": ("compressed with gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", ".zst"),
    b"BZh": ("compressed with bzip2", ".bz2"),
    b"\xfd7zXZ": ("compressed with xz", ".xz"),
    b"PK\x03\x04": ("a zip archive", None),
    **{begin: (f"text in {name}", None) for name, begins in _WIDE.items() for begin in begins},
    b"version https://git-lfs": ("a pointer of Git LFS, without the data", None),
    b"<": ("a page of HTML or XML", None),
}
"""What files begin with that have another suffix, and the suffix that they should have."""
_RETURNS = re.compile(r"\}[ \t]*\r[ \t\r]*\{")
_A_LINE = "`jq -c .` writes an object a line"
_DOCUMENT = re.compile(rb"(?:\xef\xbb\xbf)?\s*[\[{]\s*\n")


def _check_kind(path: Path) -> None:
    """Refuse a file that is of another kind than its name says.

    Raises:
        DataError: it is, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(64)
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror or error}", where=str(path)) from None
    suffix = path.suffix.lower().replace(".feather", ".arrow")
    for first, (what, expected) in _BEGINS.items():
        if begin.startswith(first) and suffix != expected:
            hint = f"read are {KINDS}"
            if expected is not None:
                hint = f"name it {path.name if expected in COMPRESSED else path.stem}{expected}"
            elif "LFS" in what:
                hint = "`git lfs pull` fetches it"
            elif "UTF" in what:
                hint = f"`iconv -f {what.rpartition(' ')[2]} -t UTF-8` converts it"
            elif "Feather" in what:
                hint = "write it as version 2, which is an Arrow file"
            raise DataError(f"the file is {what}", where=str(path), hint=hint)
    if suffix in LINES and (document := _DOCUMENT.match(begin)):
        if document[0].strip().endswith(b"{"):  # one object, or several after one another
            raise DataError("the file has its objects over several lines each", where=str(path), hint=_A_LINE)
        what = "the file is one JSON document, not an object a line"
        raise DataError(what, where=str(path), hint=f"name it {path.stem}.json")


def as_record(row: Any) -> Any:
    """Return a row of a table, or a BadRow for why it has none."""
    return BadRow(str(row)) if isinstance(row, JsonError) else row


def _json_lines(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield f"{path}:{number}", _parse_row(line.strip())
    except _DAMAGE as error:
        raise DataError(f"cannot read the file: {error}", where=f"{path}:{number + 1}") from None


def _parse_row(line: bytes) -> Any:
    try:
        return parse_json(line, is_row=True)
    except JsonError as error:
        return BadRow(_reason(str(error), line.decode(errors="replace")))


def _reason(error: str, text: str) -> str:
    """Say why a row or a file is not JSON, and what to do where that is known."""
    if not text.strip("\0 \t\r\n"):
        return "a line of zero bytes: the file was not written to its end"
    if "\0" in text:
        return "not UTF-8: text in UTF-16 or UTF-32, or binary"
    if _RETURNS.search(text) and "\n" not in text:
        return "not JSON: the lines end in CR alone; `tr '\\r' '\\n'` mends it"
    if error.startswith("Extra data at line"):
        return f"not one JSON document, but another value at {error.removeprefix('Extra data at ')}; {_A_LINE}"
    if "no number of JSON" in error:
        return f"not JSON: {error}; write null for it, as pandas' to_json does"
    return error if error.startswith("not UTF-8") else f"not JSON: {error}"


_CHUNK = 1 << 16
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)


def _open(path: Path) -> IO[bytes]:
    opens: dict[str, Callable[..., Any]] = {
        ".gz": gzip.open,
        ".bz2": lambda path, mode: io.BufferedReader(_Streams(path, bz2.BZ2Decompressor)),
        ".xz": lambda path, mode: io.BufferedReader(_Streams(path, lzma.LZMADecompressor)),
        ".zst": _open_zstd,
    }
    return opens.get(path.suffix.lower(), Path.open)(path, "rb")


class _Streams(io.RawIOBase):
    """A file of compressed streams one after another; Python's own readers end, in silence, at one that is damaged."""

    def __init__(self, path: Path, new: Callable[[], Any]) -> None:
        self._file, self._new = path.open("rb"), new
        self._stream = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            given = b""
            if self._stream.eof:
                given = self._stream.unused_data.lstrip(b"\0") or self._file.read(_CHUNK).lstrip(b"\0")
                if not given:  # the end, or zeros, with which xz fills up
                    if self._file.read(1) == b"":
                        return 0
                    self._file.seek(-1, io.SEEK_CUR)
                    continue
                self._stream = self._new()
            elif self._stream.needs_input and not (given := self._file.read(_CHUNK)):
                raise EOFError("the file ends before its compressed stream does")
            if found := self._stream.decompress(given, len(buffer)):
                buffer[: len(found)] = found
                return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    # pyarrow takes 0.2 seconds to import; built-in sources do without it.
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path), mode), "zstd"))


def _is_lines(path: Path) -> bool:
    """Return whether the first line of a `.json` file is a whole value of its own, and no list of rows."""
    try:
        with _open(path) as stream:
            first = next((line for line in stream if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")
    except _DAMAGE:
        return True  # _json_lines raises the same error with its place
    first = first.removeprefix(b"\xef\xbb\xbf").strip()
    return not first.startswith(b"[") and not isinstance(_parse_row(first), BadRow)


def _json_document(path: Path) -> Iterator[Record]:
    text = ""
    try:
        with _open(path) as stream:
            text = stream.read().decode("utf-8-sig")
        value = parse_json(text, is_row=True)
    except JsonError as error:
        raise DataError(_reason(str(error), text), where=f"{path}:{error.line}") from None
    except (*_DAMAGE, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the file: {error}", where=str(path)) from None
    if not isinstance(value, list):
        return iter([(str(path), value)])
    return ((f"{path} item {number}", each) for number, each in enumerate(value, 1))


def _table(path: Path, kind: str) -> Iterator[Record]:
    # pyarrow takes 0.2 seconds to import; built-in sources are JSON lines.
    import pyarrow as pa

    from dllm.prompts.files.arrow import ipc_rows, parquet_rows

    number = 0
    try:
        for number, row in enumerate(parquet_rows(path) if kind == ".parquet" else ipc_rows(path), 1):
            yield f"{path} row {number}", as_record(row)
    except (pa.ArrowException, OSError) as error:
        what = f"cannot read the {kind.removeprefix('.')} file: {one_line(str(error), 200)}"
        raise DataError(what, where=f"{path} row {number + 1}") from None
