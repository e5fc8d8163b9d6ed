"""A finished folder of answers, made from rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dllm.responses.counts import ManifestCounts
from dllm.responses.shards import SCHEMA, Row, shard_name, write_manifest, write_shard


def write_rows(rows: Iterable[Row], dir: Path, shard_size: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write rows, already in order of prompt id, sample and turn, as shards and a manifest; return the manifest."""
    entries = []
    counts = ManifestCounts()
    pending = iter(rows)
    while chunk := list(itertools.islice(pending, shard_size)):
        entries.append(write_shard(chunk, dir / shard_name(len(entries))))
        counts += ManifestCounts.of(chunk)
    manifest = {"schema": SCHEMA, **about, **counts.to_json(), "shards": entries}
    write_manifest(dir, manifest)
    return manifest
