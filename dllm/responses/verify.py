"""Verify a folder of responses against its manifest: every hash, every row and every count.

Stops at the first mismatch and names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dllm.errors import DataError
from dllm.outside import parse_json
from dllm.responses import shards
from dllm.responses.counts import ManifestCounts
from dllm.responses.flags import FLAGS, GIVEN, LENGTH, flags_of
from dllm.responses.shards import MANIFEST, REJECTED, Row

ENDS = ("stop", "length", "tool_calls")
_MAKE_AGAIN = "restore the folder, or regenerate again"


def verify(dir: Path) -> dict[str, str]:
    """Check a folder of responses against its manifest; return each check and its finding.

    One shard is in memory at a time, and a number for every row.

    Raises:
        DataError: something does not match; it names the first mismatch.
    """
    manifest = shards.read_manifest(dir)
    _check_names(dir, manifest)
    found = {"manifest": f"schema {manifest['schema']}, finished"}
    rows = _Rows(manifest.get("stop_ids"))
    total = ManifestCounts()
    for entry in manifest["shards"]:
        counts = ManifestCounts()
        for row in shards.read_shard(dir, entry):
            where = f"{dir / entry['file']} row {counts.rows}"
            _check_row(row, where)
            rows.take(row, where)
            counts.add(row)
        if "counts" in entry:
            declared = _counts(entry["counts"], f"{dir / MANIFEST}: {entry['file']}")
            # Dropped rows and rejected requests are in no shard.
            counts.dropped, counts.rejected = declared.dropped, declared.rejected
            _check_counts(declared, counts, f"{dir / MANIFEST}: {entry['file']}")
        total += counts
    rows.check_ends()
    found["shards"] = f"{len(manifest['shards'])}, sha256, columns and number of rows"
    found["rows"] = f"{total.rows}, each (prompt, sample, turn) once"
    found["ends"] = ", ".join(f"{n} {reason}" for reason, n in sorted(total.finish_reasons.items())) or "none"
    found["flags"] = ", ".join(f"{n} {flag}" for flag, n in sorted(total.flags.items())) or "none"
    declared = _counts(manifest, str(dir / MANIFEST))
    if not any("counts" in entry for entry in manifest["shards"]):
        total.dropped, total.rejected = declared.dropped, declared.rejected
    _check_counts(declared, total, str(dir / MANIFEST))
    found["counts"] = f"{total.tokens} tokens, rows by finish reason, split, source and flag"
    found["rejected"] = _check_rejected(dir, declared.rejected, rows)
    return found


class _Rows:
    """Checks between rows: each occurs once, and only uncut responses end with a stop id."""

    def __init__(self, stop_ids: list[int] | None) -> None:
        self._seen: set[int] = set()
        self._stops = set(stop_ids or ())
        self._is_open = stop_ids is None
        """Whether the stop ids are collected from the rows, since the manifest has none."""
        self._cut: dict[int, str] = {}

    def take(self, row: Row, where: str) -> None:
        key = (row.prompt_id, row.sample, row.turn)
        number = _number(*key, where)
        if number in self._seen:
            raise _broken(f"prompt {key[0]} sample {key[1]} turn {key[2]} occurs twice", where)
        self._seen.add(number)
        if row.finish_reason == LENGTH:
            if row.answer_ids:
                self._cut.setdefault(row.answer_ids[-1], where)
        elif not row.answer_ids:
            raise _broken(f"a response that ends with {row.finish_reason} has no stop id", where)
        elif self._is_open:
            self._stops.add(row.answer_ids[-1])
        elif row.answer_ids[-1] not in self._stops:
            raise _broken(f"the response ends with id {row.answer_ids[-1]}, which is no stop id", where)

    def has(self, prompt_id: str, sample: int, turn: int, where: str) -> bool:
        return _number(prompt_id, sample, turn, where) in self._seen

    def check_ends(self) -> None:
        for id in self._stops & self._cut.keys():
            raise _broken(f"a response that was cut ends with the stop id {id}", self._cut[id])


def _number(prompt_id: str, sample: int, turn: int, where: str) -> int:
    """Pack a row's key into one number, so that a million of them take little memory."""
    try:
        return (int(prompt_id, 16) << 64) + (sample << 32) + turn
    except ValueError:
        raise _broken(f"{prompt_id!r} is no prompt's id", where) from None


def _check_names(dir: Path, manifest: dict[str, Any]) -> None:
    listed = {entry["file"] for entry in manifest["shards"]}
    for path in sorted(dir.glob("*.parquet")):
        if path.name not in listed:
            raise _broken("a shard that the manifest does not list", path)


def _check_row(row: Row, where: str) -> None:
    if row.num_tokens != len(row.answer_ids):
        raise _broken(f"num_tokens is {row.num_tokens} for {len(row.answer_ids)} ids", where)
    if row.finish_reason not in ENDS:
        raise _broken(f"finish_reason is {row.finish_reason!r}, none of {', '.join(ENDS)}", where)
    if not row.prompt_ids or not row.messages or row.messages[-1]["role"] != "assistant":
        raise _broken("the row has no context or no response", where)
    response = row.messages[-1]
    due = flags_of(row.answer_ids, row.finish_reason, response["content"], response.get("tool_calls", ()))
    if row.flags != [flag for flag in FLAGS if flag in due or (flag in GIVEN and flag in row.flags)]:
        raise _broken(f"flags are {row.flags}, though the response has {due}", where)


def _counts(found: dict[str, Any], where: str) -> ManifestCounts:
    try:
        return ManifestCounts.from_json(found)
    except (KeyError, TypeError):
        raise _broken("the manifest lacks counts", where) from None


def _check_counts(declared: ManifestCounts, found: ManifestCounts, where: str) -> None:
    for (name, one), two in zip(declared.to_json().items(), found.to_json().values(), strict=True):
        if one != two:
            raise _broken(f"{name} should be {two}, the manifest says {one}", where)


def _check_rejected(dir: Path, count: int, rows: _Rows) -> str:
    path = dir / REJECTED
    refused = set()
    for where, key in _rejected(path):
        if key in refused or rows.has(*key, where):
            raise _broken("prompt {} sample {} turn {} was refused and also has a row".format(*key), where)
        refused.add(key)
    if len(refused) != count:
        raise _broken(f"{len(refused)} requests are listed, the manifest says {count}", path)
    return f"{count} requests, none of them among the rows"


def _rejected(path: Path) -> Iterator[tuple[str, tuple[str, int, int]]]:
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                record = parse_json(line)
                key, _ = (str(record["prompt_id"]), int(record["sample"]), int(record["turn"])), record["reason"]
            except (ValueError, TypeError, KeyError):
                raise _broken("no prompt_id, sample, turn and reason", where) from None
            yield where, key


def _broken(what: str, where: Path | str) -> DataError:
    return DataError(what, where=str(where), hint=_MAKE_AGAIN)
