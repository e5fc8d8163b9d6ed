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

from dllm.errors import DataError
from dllm.files import atomic_write
from dllm.prompts.columns import chat_fields, from_columns, to_columns
from dllm.prompts.turns import Message, Tools
from dllm.secrets import hide_in

SCHEMA = 2
MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
"""Requests that got no response, one JSON object a line: `prompt_id`, `sample`, `turn` and `reason`."""
_AGAIN = "run `python -m dllm regenerate` again"


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


def write_manifest(dir: Path, manifest: Mapping[str, Any]) -> Path:
    """Write the manifest, without secrets; it says that every shard it lists is complete, so call this last."""
    path = dir / MANIFEST
    text = json.dumps(hide_in(manifest), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    atomic_write(path, text.encode())
    return path


def read_manifest(dir: Path) -> dict[str, Any]:
    """Read the manifest of a finished folder.

    Raises:
        DataError: the folder is unfinished, or its manifest is damaged or of another version.
    """
    path = dir / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        complete = isinstance(manifest["shards"], list)
    except FileNotFoundError:
        raise DataError("no finished responses", where=str(path), hint="run `python -m dllm regenerate`") from None
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError("the manifest is damaged", where=str(path), hint=_AGAIN) from None
    if manifest.get("schema") != SCHEMA or not complete:
        raise DataError(f"manifest schema {manifest.get('schema')}, expected {SCHEMA}", where=str(path), hint=_AGAIN)
    return manifest


def read_rows(dir: Path, split: str | None = None) -> list[Row]:
    """Read all rows, or one split's, in order; see `iter_rows`."""
    return list(iter_rows(dir, split))


def iter_rows(dir: Path, split: str | None = None) -> Iterator[Row]:
    """Read the rows shard by shard, each checked against the manifest before any of its rows is used.

    Raises:
        DataError: the folder is unfinished, or a shard is missing, damaged or not the manifest's; it names the shard.
    """
    for entry in read_manifest(dir)["shards"]:
        for row in read_shard(dir, entry):
            if split is None or row.split == split:
                yield row


def read_shard(dir: Path, entry: ShardEntry) -> Iterator[Row]:
    """Read one shard's rows; the whole of it is checked before the first is given.

    Raises:
        DataError: the shard is missing, damaged or not the manifest's; it names the shard.
    """
    path = dir / entry["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the shard: {error.strerror}", where=str(path), hint=_AGAIN) from None
    found = hashlib.sha256(data).hexdigest()
    if found != entry["sha256"]:
        raise DataError(
            f"the shard is not the manifest's: sha256 {found[:12]}, expected {entry['sha256'][:12]}",
            where=str(path),
            hint="run `dvc checkout`, or `python -m dllm regenerate` again",
        )
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"the shard is unreadable: {reason}", where=str(path), hint=_AGAIN) from None
    if table.schema != schema() or table.num_rows != entry["rows"]:
        raise DataError("the shard has other columns or rows than its manifest", where=str(path), hint=_AGAIN)
    for row in table.to_pylist():
        yield Row(**from_columns(row))
