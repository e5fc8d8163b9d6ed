"""Open and finished shards, in a folder that stays consistent when the process is killed at any moment.

On disk before the result is published: a journal of responses for each open shard; for each finished one its parquet
file, then its record, and no journal. A shard is finished when its record exists and the digest in it is that of the
file.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm.digests import sealed, unsealed
from dllm.disk_faults import is_unreadable
from dllm.engines.engine import Response, request_key
from dllm.errors import StageError
from dllm.files import atomic_write
from dllm.regeneration.journal import ResponseJournal
from dllm.regeneration.rollout import Rollout
from dllm.responses import shards
from dllm.responses.counts import ManifestCounts

_log = logging.getLogger(__name__)


@dataclass
class OpenShard:
    """A shard with rollouts that are not over."""

    index: int
    journal: ResponseJournal
    rollouts: list[Rollout] = field(default_factory=list)
    """In the order of the input."""
    unfinished: int = 0
    is_full: bool = False
    """Whether no rollout will be added."""


@dataclass(frozen=True)
class ShardRecord:
    """The record of a finished shard."""

    entry: dict[str, Any]
    """For the manifest: file, rows, sha256 and counts."""
    rollouts: int
    turns: int
    """Turns of its rollouts, with a response or not."""
    origins: str
    """Digest of its prompts and samples."""
    rejected: list[dict[str, Any]]
    """Of each refused request: key, reason, and whether the next call tries again."""


class ShardStore:
    """The shards of one result.

    Args:
        folder: created where it is missing.
        drop: flags whose rows are left out.
    """

    def __init__(self, folder: Path, drop: Sequence[str] = ()) -> None:
        self.folder, self._drop = folder, drop
        self.finished: set[int] = set()
        self.turns_done = 0
        """Turns of finished shards."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("shard-*.json")):
            if found := re.fullmatch(r"shard-([0-9]{5}|[1-9][0-9]{5,9})\.json", path.name):
                self._load(path, int(found[1]))

    def responses_kept(self) -> int:
        """Count the responses in the journals of open shards."""
        count = 0
        for path in self.folder.glob("journal-*.jsonl"):
            with ResponseJournal(path) as journal:
                count += len(journal)
        return count

    def open(self, index: int) -> OpenShard:
        """Open a shard; its journal holds the responses of a killed call."""
        return OpenShard(index, ResponseJournal(self._path("journal", index, "jsonl")))

    def check(self, index: int, origins: str) -> None:
        """Check that a finished shard was made of these prompts and samples.

        Raises:
            StageError: it was made of others.
        """
        if self.record(index).origins != origins:
            raise StageError(
                "a finished shard is of other prompts than those at its place in the input",
                where=str(self._path("shard", index, "json")),
                hint="the input has changed: remove this file's folder and run again",
            )

    def finish(self, shard: OpenShard) -> None:
        """Write a shard whose rollouts are all over, and remove its journal."""
        counts, rows, rejected, turns = ManifestCounts(), [], [], 0
        for rollout in shard.rollouts:
            turns += rollout.turns
            for row in rollout.rows():
                dropped = next((flag for flag in self._drop if flag in row.flags), None)
                if dropped is None:
                    counts.add(row)
                    rows.append(row)
                else:
                    counts.dropped[dropped] += 1
            if rollout.rejection is not None:
                counts.rejected += 1
                rejected.append(vars(rollout.rejection))
        entry = shards.write_shard(rows, self.folder / shards.shard_name(shard.index))
        record = {
            "entry": {**entry, "counts": counts.to_json()},
            "rollouts": len(shard.rollouts),
            "turns": turns,
            "origins": origins_digest(rollout.origin for rollout in shard.rollouts),
            "rejected": rejected,
        }
        atomic_write(self._path("shard", shard.index, "json"), sealed(record))
        shard.journal.close()
        shard.journal.path.unlink()
        self.finished.add(shard.index)
        self.turns_done += turns

    def record(self, index: int) -> ShardRecord:
        """Read the record of a finished shard."""
        return ShardRecord(**unsealed(self._path("shard", index, "json").read_bytes()))

    def records(self) -> Iterator[ShardRecord]:
        """Read the records of all finished shards, in order."""
        for index in sorted(self.finished):
            yield self.record(index)

    def _load(self, path: Path, index: int) -> None:
        name = shards.shard_name(index)
        try:
            record = ShardRecord(**unsealed(path.read_bytes()))
            digest = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
            # Of another name, a file elsewhere would be read, and one elsewhere written when it is published.
            intact = (record.entry["file"], record.entry["sha256"]) == (name, digest)
            intact = intact and isinstance(record.turns, int) and isinstance(record.rollouts, int)
            ManifestCounts.from_json(record.entry["counts"])
            is_passing = any([each["is_passing"] for each in record.rejected])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if is_unreadable(error):
                raise
            intact = is_passing = False
        if not intact:
            _log.warning("%s: damaged; the shard is generated again", path)
            path.unlink()
            return
        if is_passing:
            self._reopen(index, record)
            return
        self._path("journal", index, "jsonl").unlink(missing_ok=True)
        self.finished.add(index)
        self.turns_done += record.turns

    def _reopen(self, index: int, record: ShardRecord) -> None:
        """Turn a shard with requests that servers failed into a journal again; only those are then missing."""
        with self.open(index).journal as journal:
            for row in shards.read_shard(self.folder, record.entry):  # type: ignore[arg-type]
                journal.append(response_of(row))
        self._path("shard", index, "json").unlink()

    def _path(self, kind: str, index: int, suffix: str) -> Path:
        return self.folder / f"{kind}-{index:05d}.{suffix}"


def response_of(row: shards.Row) -> Response:
    """Return the response of which a row was made."""
    message, key = row.messages[-1], request_key(row.prompt_id, row.sample, row.turn)
    calls = tuple(message.get("tool_calls", ()))
    return Response(key, tuple(row.answer_ids), message["content"], row.finish_reason, calls)


def origins_digest(origins: Iterator[str]) -> str:
    """Hash the origins of rollouts, in order, into 16 hex digits."""
    digest = hashlib.sha256()
    for origin in origins:
        digest.update(f"{origin}\n".encode())
    return digest.hexdigest()[:16]
