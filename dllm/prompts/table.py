"""Prompts: their ids, the held-out split, and the table that `prepare` publishes.

A prompt's id is a hash of its turns, so the same prompt has the same id in every source. The split follows from the id
alone, so adding a source never moves a prompt from one split to the other.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dllm.errors import DataError
from dllm.files import atomic_write
from dllm.prompts.chats.parquet import chat_fields, from_columns, to_columns
from dllm.prompts.chats.turns import Message, Tools
from dllm.prompts.files.arrow import read_table

FILE = "prompts.parquet"
TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True)
class Prompt:
    """A chat that ends with a turn by the user or a tool."""

    id: str
    """Hash of the messages and tools, 16 hex digits."""
    source: str
    split: str
    """`train` or `heldout`."""
    messages: list[Message]
    tools: Tools | None = None
    """Schemas of the tools the assistant may call."""
    given: str | None = None
    """The source's own response, where it has one."""
    reference: str | None = None
    """The correct result, where the source knows it; kept beside the table, see `references`."""


def prompt_id(messages: Sequence[Message], tools: Tools | None = None) -> str:
    """Hash a chat's turns, and its tools where there are any, into 16 hex digits."""
    turns = [dict(sorted(message.items())) for message in messages]
    text = json.dumps(turns if tools is None else [turns, tools], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_heldout(id: str, fraction: float) -> bool:
    """Return whether a prompt is held out, from its id and the fraction alone.

    A larger fraction holds out a superset.
    """
    # Hashed again: `limit` keeps the smallest ids, and those must not be the held-out ones.
    draw = int.from_bytes(hashlib.sha256(f"heldout {id}".encode()).digest()[:8])
    return draw < fraction * 2**64


def split_of(id: str, fraction: float) -> str:
    """Return the split of a prompt."""
    return HELDOUT if is_heldout(id, fraction) else TRAIN


def schema() -> pa.Schema:
    """Describe the columns of prompts.parquet."""
    texts = [(name, pa.string()) for name in ("id", "source", "split")]
    return pa.schema([*texts, *chat_fields(), ("given", pa.string())])


def write_prompts(prompts: Iterable[Prompt], path: Path) -> None:
    """Write prompts as parquet; equal prompts make equal bytes."""
    buffer = io.BytesIO()
    columns = [vars(prompt) | to_columns(prompt.messages, prompt.tools) for prompt in prompts]
    pq.write_table(pa.Table.from_pylist(columns, schema=schema()), buffer, compression="zstd")
    atomic_write(path, buffer.getvalue())


def read_prompts(dir: Path, split: str | None = None) -> list[Prompt]:
    """Read what `prepare` published, all of it or one split, in order of id.

    Raises:
        DataError: the file is missing or is not what `prepare` writes.
    """
    path = dir / FILE
    try:
        table = read_table(path)
    except FileNotFoundError:
        raise DataError("no prompts yet", where=str(path), hint="run `python -m dllm prepare`") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"unreadable: {reason}", where=str(path), hint="run `python -m dllm prepare` again") from None
    if table.schema.names != schema().names:
        what = f"columns {table.schema.names}, expected {schema().names}"
        raise DataError(what, where=str(path), hint="run `python -m dllm prepare` again")
    try:
        prompts = [Prompt(**from_columns(row)) for row in table.to_pylist()]
    except (ValueError, TypeError, KeyError):
        raise DataError("a row is no prompt", where=str(path), hint="run `python -m dllm prepare` again") from None
    return [prompt for prompt in prompts if split is None or prompt.split == split]
