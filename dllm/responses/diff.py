"""Compare two folders of responses: which rows were added, removed or changed, and how their lengths and flags did.

Rows are told apart by prompt, sample and turn. Memory holds one shard and one count a length; what is known of each
row lies in a database on disk, so the rows may stand in any order.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import Any

from dllm.responses.counts import ManifestCounts
from dllm.responses.shards import Row, iter_rows, read_manifest

NAMED = 3
"""Changed, added and removed prompts that are named."""
MADE = ("target", "sampling", "thinking", "template", "stop_ids", "drop")
"""Keys of a manifest that say how its responses were made."""


def diff(a: Path, b: Path, scratch: Path) -> dict[str, Any]:
    """Compare two folders of responses, each row checked against its manifest.

    Args:
        a: the older one.
        b: the newer one.
        scratch: an existing folder for what is known of each row, some 100 bytes.

    Returns: `rows`, with the numbers of rows that are in both with the same response, in both with another one, and in
        one alone; `prompts`, the first ids of each; `a` and `b`, each with counts and lengths; `settings`, the pairs of
        values of the manifests that differ.

    Raises:
        DataError: a folder is unfinished, or a shard is missing or damaged.
    """
    with closing(sqlite3.connect(scratch / "rows.db", isolation_level=None)) as store:
        store.execute("pragma journal_mode = off")
        store.execute("pragma synchronous = off")
        sides = {name: _take(store, name, folder) for name, folder in (("a", a), ("b", b))}
        both = "from a join b using (prompt, sample, turn) where a.response {} b.response"
        queries = {
            "same": both.format("="),
            "changed": both.format("!="),
            "added": f"from b where not exists (select 1 from a where {_SAME_ROW})",
            "removed": f"from a where not exists (select 1 from b where {_SAME_ROW})",
        }
        rows = {name: store.execute(f"select count(*) {query}").fetchone()[0] for name, query in queries.items()}
        prompts = {
            name: [
                prompt
                for (prompt,) in store.execute(f"select distinct prompt {queries[name]} order by 1 limit {NAMED}")
            ]
            for name in ("changed", "added", "removed")
        }
    return {"rows": rows, "prompts": prompts, **sides, "settings": _settings(read_manifest(a), read_manifest(b))}


_SAME_ROW = "a.prompt = b.prompt and a.sample = b.sample and a.turn = b.turn"


def _take(store: sqlite3.Connection, name: str, folder: Path) -> dict[str, Any]:
    counts, lengths = ManifestCounts(), Counter[int]()

    def entries() -> Iterator[tuple[str, int, int, bytes]]:
        for row in iter_rows(folder):
            counts.add(row)
            lengths[row.num_tokens] += 1
            yield row.prompt_id, row.sample, row.turn, _digest(row)

    store.execute(
        f"create table {name} (prompt, sample, turn, response, primary key (prompt, sample, turn)) without rowid"
    )
    store.execute("begin")
    store.executemany(f"insert into {name} values (?, ?, ?, ?)", entries())
    store.execute("commit")
    return {
        "rows": counts.rows,
        "tokens": counts.tokens,
        "length": _lengths(lengths),
        "ends": dict(sorted(counts.finish_reasons.items())),
        "flags": dict(sorted(counts.flags.items())),
        "splits": dict(sorted(counts.splits.items())),
    }


def _digest(row: Row) -> bytes:
    return hashlib.sha256(repr((row.answer_ids, row.finish_reason)).encode()).digest()[:12]


def _lengths(lengths: Counter[int]) -> dict[str, float | None]:
    """Return mean, median, 95th percentile and maximum of the numbers of tokens."""
    total = sum(lengths.values())
    if not total:
        return dict.fromkeys(("mean", "median", "p95", "max"))
    values = sorted(lengths)
    until = list(accumulate(lengths[value] for value in values))

    def percentile(share: float) -> int:
        return next(value for value, below in zip(values, until, strict=True) if below >= share * total)

    mean = sum(value * number for value, number in lengths.items()) / total
    return {"mean": round(mean, 2), "median": percentile(0.5), "p95": percentile(0.95), "max": values[-1]}


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the values of both manifests, for those that say how responses are made and differ."""
    one, other = ({key: value for name in MADE for key, value in _flat(name, of.get(name))} for of in (a, b))
    keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    return {key: [one.get(key), other.get(key)] for key in keys}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value
