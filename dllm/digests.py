"""Digests by which damaged or foreign bytes are told from what was written.

A JSON record that stands for other files lists their digests, and is sealed: it holds a digest of its own bytes. So
one record vouches for a whole folder: state.json for a checkpoint, manifest.json for responses, run.json for what a
stage has published.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dllm.disk_faults import is_unreadable
from dllm.errors import DllmError
from dllm.outside import parse_json

SEAL = "seal"
_BLANK = b"0" * 64
_SEALED = re.compile(rb'"seal": "([0-9a-f]{64})"')


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, in 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_digests(folder: Path, leave_out: Collection[str] = ()) -> dict[str, str]:
    """Return the digest of every file in a folder, by its name in it."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: file_digest(path) for name, path in files.items() if name not in leave_out}


def tree_digest(digests: Mapping[str, str]) -> str:
    """Combine the digests of a folder's files into one."""
    names = sorted(digests, key=lambda name: name.split("/"))
    return hashlib.sha256("".join(f"{name}\0{digests[name]}\n" for name in names).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> bytes:
    """Write a record as JSON that holds, as `seal`, the sha256 of its own bytes with zeros in that place."""
    text = json.dumps(
        {**record, SEAL: _BLANK.decode()}, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False, default=str
    )
    data = f"{text}\n".encode()
    return data.replace(_seal(_BLANK), _seal(hashlib.sha256(data).hexdigest().encode()))


def unsealed(data: bytes) -> dict[str, Any]:
    """Read what `sealed` wrote, without its seal; a record that has no seal, of an older version, is taken as it is.

    Raises:
        ValueError: it is not a JSON object, or not what was sealed.
    """
    record = parse_json(data)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    found = record.pop(SEAL, None)
    marks = _SEALED.findall(data)
    if found is None and not marks:
        return record
    blank = _SEALED.sub(_seal(_BLANK), data)
    if len(marks) != 1 or hashlib.sha256(blank).hexdigest().encode() != marks[0]:
        raise ValueError("its bytes are not those that were written")
    return record


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Read a sealed record of unfinished work; None where it is not there, torn or damaged, and is to be made again."""
    if not path.is_file():
        return None
    try:
        data = path.read_bytes()
        return unsealed(data) if is_sealed(data) else None
    except (OSError, ValueError) as error:
        if is_unreadable(error):
            raise
        print(f"note: {path} is damaged; what it holds is made again", file=sys.stderr)
        return None


def is_sealed(data: bytes) -> bool:
    """Tell whether a record has a seal, right or wrong."""
    return bool(_SEALED.search(data))


def check_files(
    folder: Path, digests: Mapping[str, str], *, error: type[DllmError], hint: str, but: Collection[str] | None = None
) -> None:
    """Compare files with their digests, before any of them is used.

    Args:
        folder: where they lie.
        digests: sha256 by name in the folder.
        error: its class says whose fault a difference is.
        hint: what to do about it.
        but: refuse every other file except these; None accepts others.

    Raises:
        DllmError: of class `error`; a file is missing, has other bytes, or is not listed. It is named.
    """
    for name, expected in digests.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise error(f"a record names a file outside its folder: {name!r}", where=str(folder), hint=hint)
        if not path.is_file():
            raise error("a file is missing", where=str(path), hint=hint)
        if (found := file_digest(path)) != expected:
            raise error(
                f"damaged or of another origin: sha256 {found[:12]}, expected {expected[:12]}",
                where=str(path),
                hint=hint,
            )
    if but is not None:
        known = {*digests, *but}
        others = (path for path in sorted(folder.rglob("*")) if path.is_file())
        if other := next((path for path in others if path.relative_to(folder).as_posix() not in known), None):
            raise error("a file that the run did not write", where=str(other), hint=hint)


def _seal(digits: bytes) -> bytes:
    return b'"seal": "' + digits + b'"'
