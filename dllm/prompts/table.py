"""Prompts: their ids, which are held out, and the table `prepare` leaves.

Owns identity. A prompt's id is a hash of its turns, so the same prompt has the same id wherever it comes from; the
held-out part follows from the id alone, so adding sources never moves a prompt from one side to the other.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.config.params import Prepare, Source
from dllm.errors import DataError
from dllm.files import atomic_write
from dllm.prompts import sources
from dllm.prompts.columns import chat_fields, from_columns, to_columns
from dllm.prompts.references import as_reference
from dllm.prompts.turns import Message, Tools, Unusable, given_answer, to_chat

if TYPE_CHECKING:
    import pyarrow as pa

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
    """The answer the source itself gives, where it gives one."""
    reference: str | None = None
    """What the right answer comes to, where the source knows; not in the table: see `references`."""


def prompt_id(messages: Sequence[Message], tools: Tools | None = None) -> str:
    """Hash a chat's turns, and its tools where there are any, into 16 hex digits."""
    turns = [dict(sorted(message.items())) for message in messages]
    text = json.dumps(turns if tools is None else [turns, tools], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_heldout(id: str, fraction: float) -> bool:
    """Tell whether a prompt is held out: a matter of its id and the fraction, and of nothing else.

    A larger fraction holds out a superset.
    """
    # Hashed again: `limit` keeps the smallest ids, and those must not be the held-out ones.
    draw = int.from_bytes(hashlib.sha256(f"heldout {id}".encode()).digest()[:8])
    return draw < fraction * 2**64


def split_of(id: str, fraction: float) -> str:
    """Name the split a prompt belongs to."""
    return HELDOUT if is_heldout(id, fraction) else TRAIN


def collect(prepare: Prepare, root: Path) -> tuple[list[Prompt], dict[str, Any]]:
    """Read every source; return the prompts in order of id, and what was counted on the way.

    Raises:
        DataError: a source cannot be read, or one of the two splits would be empty.
    """
    kept: dict[str, Prompt] = {}
    counts: dict[str, Any] = {}
    for source in prepare.sources:
        own, tally = _collect_one(source, root, kept, prepare.heldout_fraction)
        kept.update(own)
        name = sources.label(source)
        if name in counts:
            counts[name] = _merged(counts[name], tally)
        else:
            counts[name] = tally
    totals = Counter(prompt.split for prompt in kept.values())
    _check_splits(totals, prepare, counts)
    report = {
        "prompts": len(kept),
        TRAIN: totals[TRAIN],
        HELDOUT: totals[HELDOUT],
        "duplicates": sum(tally["duplicates"] for tally in counts.values()),
        "refused": sum(sum(tally["refused"].values()) for tally in counts.values()),
        "sources": counts,
    }
    return [kept[id] for id in sorted(kept)], report


def _collect_one(
    source: Source, root: Path, others: dict[str, Prompt], fraction: float
) -> tuple[dict[str, Prompt], dict[str, Any]]:
    found: dict[str, tuple[list[Message], Tools | None, str | None, str | None]] = {}
    refused: Counter[str] = Counter()
    num_rows = duplicates = 0
    for where, chat, tools, reference in sources.rows(source, root):
        num_rows += 1
        try:
            asked, given = to_chat(chat, tools, where), given_answer(chat, where)
        except Unusable as reason:
            refused[str(reason)] += 1
            continue
        id = prompt_id(*asked)
        duplicates += id in found or id in others
        if id not in others:
            found.setdefault(id, (*asked, given, as_reference(reference)))
    ids = sorted(found)[: source.limit]
    name = sources.label(source)
    own = {id: Prompt(id, name, split_of(id, fraction), *found[id]) for id in ids}
    splits = Counter(prompt.split for prompt in own.values())
    tally = {
        "rows": num_rows,
        TRAIN: splits[TRAIN],
        HELDOUT: splits[HELDOUT],
        "duplicates": duplicates,
        "refused": dict(sorted(refused.items())),
        "over_limit": len(found) - len(ids),
    }
    return own, tally


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {
        key: dict(Counter(value) + Counter(other[key])) if isinstance(value, dict) else value + other[key]
        for key, value in one.items()
    }


def _check_splits(totals: Counter[str], prepare: Prepare, counts: dict[str, Any]) -> None:
    total = totals[TRAIN] + totals[HELDOUT]
    if total == 0:
        refused: Counter[str] = sum((Counter(tally["refused"]) for tally in counts.values()), Counter())
        reasons = ", ".join(f"{n} with {reason}" for reason, n in refused.items())
        rows = sum(tally["rows"] for tally in counts.values())
        raise DataError(
            f"no usable prompt in {rows} rows" + (f" ({reasons})" if reasons else ""),
            where=f"prepare.sources: {', '.join(counts)}",
            hint="every row needs a user turn with text",
        )
    for split in (TRAIN, HELDOUT):
        if totals[split] == 0:
            raise DataError(
                f"none of {total} prompts falls into the {split} split",
                where=f"prepare.heldout_fraction: {prepare.heldout_fraction}",
                hint="give more prompts or another fraction",
            )


def schema() -> pa.Schema:
    """Describe the columns of prompts.parquet."""
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("id", "source", "split")]
    return pa.schema([*texts, *chat_fields(), ("given", pa.string())])


def write_prompts(prompts: Iterable[Prompt], path: Path) -> None:
    """Write prompts as parquet; equal prompts make equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    columns = [vars(prompt) | to_columns(prompt.messages, prompt.tools) for prompt in prompts]
    pq.write_table(pa.Table.from_pylist(columns, schema=schema()), buffer, compression="zstd")
    atomic_write(path, buffer.getvalue())


def read_prompts(dir: Path, split: str | None = None) -> list[Prompt]:
    """Read what `prepare` published, all of it or one split, in order of id.

    Raises:
        DataError: the file is missing or is not what `prepare` writes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = dir / FILE
    try:
        with path.open("rb") as file:
            table = pq.read_table(file)
    except FileNotFoundError:
        raise DataError("no prompts yet", where=str(path), hint="run `python -m dllm prepare`") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"unreadable: {reason}", where=str(path), hint="run `python -m dllm prepare` again") from None
    if table.schema.names != schema().names:
        what = f"columns {table.schema.names}, expected {schema().names}"
        raise DataError(what, where=str(path), hint="run `python -m dllm prepare` again")
    prompts = [Prompt(**from_columns(row)) for row in table.to_pylist()]
    return [prompt for prompt in prompts if split is None or prompt.split == split]
