"""The target's responses on disk: parquet shards, and a manifest that is written last.

A folder without a manifest is unfinished. A shard whose hash is not the manifest's is damaged, and none of its rows is
used.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from dllm.digests import sealed, unsealed
from dllm.disk_faults import is_unreadable
from dllm.errors import DataError
from dllm.files import atomic_write
from dllm.outside import is_file_name, is_text, one_line
from dllm.prompts.chats.parquet import chat_fields, from_columns, to_columns
from dllm.prompts.chats.turns import Message, Tools
from dllm.prompts.files.arrow import read_table
from dllm.secrets import hide_in

SCHEMA = 2
MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
"""Requests that got no response, one JSON object a line: `prompt_id`, `sample`, `turn` and `reason`."""
_AGAIN = "run `python -m dllm regenerate` again"
_COUNTERS = ("tokens_by_split", "finish_reasons", "splits", "sources", "flags", "dropped")
_KINDS: dict[str, type] = {
    **dict.fromkeys(("rows", "tokens", "rejected"), int),
    **dict.fromkeys((*_COUNTERS, "made", "target", "sampling"), dict),
    **dict.fromkeys(("stop_ids", "parts", "drop"), list),
    **dict.fromkeys(("part", "thinking", "template", "fingerprint", "fingerprint_base"), str),
}
"""Types of a manifest's values that are read, where they are there and not null."""


@dataclass(frozen=True)
class Row:
    """One response of the target to one context."""

    prompt_id: str
    sample: int
    """0-based number of the sample of this prompt."""
    source: str
    split: str
    """`train` or `heldout`."""
    messages: list[Message]
    """The context's turns and the new assistant turn."""
    prompt_ids: list[int]
    answer_ids: list[int]
    """Ends with the stop id where `finish_reason` is `stop` or `tool_calls`."""
    finish_reason: str
    """`stop`, `length` or `tool_calls`."""
    num_tokens: int
    """Ids in the response."""
    turn: int = 0
    """0-based number among the assistant's turns of the chat."""
    tools: Tools | None = None
    """Schemas of the tools that it may call."""
    flags: list[str] = field(default_factory=list)
    """Defects of the response, of `flags.FLAGS`."""


class ShardEntry(TypedDict):
    """The manifest's entry of a shard."""

    file: str
    rows: int
    sha256: str


def shard_name(index: int) -> str:
    """Name a shard by its number."""
    return f"shard-{index:05d}.parquet"


def schema() -> pa.Schema:
    """Describe the columns of a shard."""
    ids = pa.list_(pa.int32())
    return pa.schema(
        [
            ("prompt_id", pa.string()),
            ("sample", pa.int32()),
            ("turn", pa.int32()),
            ("source", pa.string()),
            ("split", pa.string()),
            *chat_fields(),
            ("prompt_ids", ids),
            ("answer_ids", ids),
            ("finish_reason", pa.string()),
            ("num_tokens", pa.int32()),
            ("flags", pa.list_(pa.string())),
        ]
    )


def write_shard(rows: Sequence[Row], path: Path) -> ShardEntry:
    """Write rows as one shard, whole or not at all; equal rows make equal bytes."""
    buffer = io.BytesIO()
    columns = [vars(row) | to_columns(row.messages, row.tools) for row in rows]
    pq.write_table(pa.Table.from_pylist(columns, schema=schema()), buffer, compression="zstd")
    data = buffer.getvalue()
    atomic_write(path, data)
    return {"file": path.name, "rows": len(rows), "sha256": hashlib.sha256(data).hexdigest()}


def _null_items(column: pa.ChunkedArray) -> int:
    """Count null ids and flags."""
    return sum(chunk.flatten().null_count for chunk in column.chunks) if pa.types.is_list(column.type) else 0


def write_manifest(dir: Path, manifest: Mapping[str, Any]) -> Path:
    """Write the manifest, sealed and without secrets; it says that its shards are complete, so call this last."""
    path = dir / MANIFEST
    atomic_write(path, sealed(hide_in(manifest)))
    return path


def read_manifest(dir: Path) -> dict[str, Any]:
    """Read the manifest of a finished folder.

    Raises:
        DataError: the folder is unfinished, or its manifest is damaged or of another version.
    """
    path = dir / MANIFEST
    try:
        manifest = unsealed(path.read_bytes())
        complete = isinstance(manifest["shards"], list)
        if not is_text(json.dumps(manifest, ensure_ascii=False)):
            raise ValueError("an unpaired surrogate")
    except FileNotFoundError:
        raise DataError("no finished responses", where=str(path), hint="run `python -m dllm regenerate`") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        if is_unreadable(error):
            raise
        raise DataError("the manifest is damaged", where=str(path), hint=_AGAIN) from None
    if not _is_whole_number(manifest.get("schema")) or manifest["schema"] != SCHEMA or not complete:
        found = one_line(str(manifest.get("schema")), 40)
        raise DataError(f"manifest schema {found}, expected {SCHEMA}", where=str(path), hint=_AGAIN)
    _check_kinds(manifest, path)
    _check_entries(manifest["shards"], path)
    return dict(manifest)


def _check_kinds(manifest: Mapping[str, Any], path: Path) -> None:
    for key, kind in _KINDS.items():
        value = manifest.get(key)
        if value is None:
            continue
        is_right = _is_whole_number(value) if kind is int else isinstance(value, kind)
        if is_right and key in (*_COUNTERS, "stop_ids"):
            is_right = all(map(_is_whole_number, value.values() if isinstance(value, dict) else value))
        if not is_right:
            raise DataError(f"the manifest is damaged: `{key}` is not what it should be", where=str(path), hint=_AGAIN)
    made = manifest.get("made") or {}
    if not isinstance(made.get("served") or {}, dict) or not isinstance(made.get("seconds", 0), int | float):
        raise DataError("the manifest is damaged: `made` is not what it should be", where=str(path), hint=_AGAIN)


def _check_entries(entries: Sequence[Any], path: Path) -> None:
    listed: set[str] = set()
    for number, entry in enumerate(entries):
        is_entry = isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("file", "sha256"))
        if not is_entry or not _is_whole_number(entry.get("rows")):
            raise DataError(f"shard {number} has no file, rows and sha256", where=str(path), hint=_AGAIN)
        name = entry["file"]
        if not is_file_name(name) or name in listed:
            raise DataError(f"{name[:60]!r} is listed twice, or lies elsewhere", where=str(path), hint=_AGAIN)
        listed.add(name)


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def read_rows(dir: Path, split: str | None = None) -> list[Row]:
    """Read all rows, or one split's, in order; see `iter_rows`."""
    return list(iter_rows(dir, split))


def iter_rows(dir: Path, split: str | None = None) -> Iterator[Row]:
    """Read the rows shard by shard, each checked against the manifest before any of its rows is used.

    Raises:
        DataError: the folder is unfinished, or a shard is missing, damaged or not the manifest's; it names the shard.
    """
    manifest = read_manifest(dir)
    listed = sum(entry["rows"] for entry in manifest["shards"])
    if manifest.get("rows") not in (None, listed):
        what = f"the shards that the manifest lists hold {listed} rows, it counts {manifest['rows']}"
        raise DataError(what, where=str(dir / MANIFEST), hint=_AGAIN)
    for entry in manifest["shards"]:
        for row in read_shard(dir, entry):
            if split is None or row.split == split:
                yield row


def read_shard(dir: Path, entry: ShardEntry) -> Iterator[Row]:
    """Read one shard's rows; the whole of it is checked before the first is given.

    Raises:
        DataError: the shard is missing, damaged or not the manifest's, or lies elsewhere; it names the shard.
    """
    if not is_file_name(entry["file"]):  # of a record: a manifest's are checked before
        raise DataError("the shard lies elsewhere", where=str(dir / str(entry["file"])[:60]), hint=_AGAIN)
    path = dir / entry["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        if is_unreadable(error):
            raise
        raise DataError(f"cannot read the shard: {error.strerror}", where=str(path), hint=_AGAIN) from None
    found = hashlib.sha256(data).hexdigest()
    if found != entry["sha256"]:
        raise DataError(
            f"the shard is not the manifest's: sha256 {found[:12]}, expected {entry['sha256'][:12]}",
            where=str(path),
            hint="run `dvc checkout`, or `python -m dllm regenerate` again",
        )
    try:
        table = read_table(pa.py_buffer(data))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"the shard is unreadable: {reason}", where=str(path), hint=_AGAIN) from None
    if table.schema != schema() or table.num_rows != entry["rows"]:
        raise DataError("the shard has other columns or rows than its manifest", where=str(path), hint=_AGAIN)
    if any(table[name].null_count or _null_items(table[name]) for name in schema().names if name != "tools"):
        raise DataError("the shard has rows without a value", where=str(path), hint=_AGAIN)
    for number, row in enumerate(table.to_pylist(), 1):
        try:
            yield Row(**from_columns(row))
        except (ValueError, TypeError, KeyError):
            raise DataError("the row holds no response", where=f"{path} row {number}", hint=_AGAIN) from None
