"""Merge the parts of one regeneration: links, sums and a manifest; no row is written again.

Parts fit together where all are of the same regeneration, none is missing, and none is given twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm.errors import DataError
from dllm.files import atomic_link, atomic_write
from dllm.responses import shards
from dllm.responses.counts import ManifestCounts
from dllm.responses.shards import MANIFEST, REJECTED

_ONE_WORK = "only parts of one regeneration can be merged"
PART, BASE = "part", "fingerprint_base"
OWN_KEYS = {PART, "fingerprint", "made", "shards", *ManifestCounts().to_json()}
"""Keys that may differ between parts."""
SERVED_KEYS = ("model", "model_path", "revision", "weights")
"""Keys of the servers' descriptions that must not differ."""


def merge(dirs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Make one folder of all parts, and return its manifest.

    Shards are hard links where the disk allows it, named after their parts. A folder that a killed call left is
    finished; one that holds the same already is left alone.

    Raises:
        DataError: parts are missing, given twice, or of different work; or `out` holds something else.
    """
    manifests = _in_order(dirs)
    parts = list(manifests.values())
    merged = _merged(parts)
    files = {
        entry["file"]: dir / source["file"]
        for (dir, manifest), entries in zip(manifests.items(), _renamed(parts), strict=True)
        for source, entry in zip(manifest["shards"], entries, strict=True)
    }
    if _is_there_already(out, merged, {*files, REJECTED}):
        return merged
    out.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        _link(source, out / name)
    refused = [path.read_bytes() for dir in manifests if (path := dir / REJECTED).exists()]
    atomic_write(out / REJECTED, b"".join(refused))
    shards.write_manifest(out, merged)
    return merged


def _in_order(dirs: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    total = None
    for dir in dirs:
        manifest = shards.read_manifest(dir)
        number, of = _part(manifest, dir)
        if number in found:
            raise DataError(f"part {manifest[PART]} is given twice, also in {found[number][0]}", where=str(dir))
        if total is not None and of != total:
            raise DataError(f"part {manifest[PART]} is of another partition than the parts of {total}", where=str(dir))
        total = of
        found[number] = dir, manifest
    missing = [f"{number}/{total}" for number in range(total or 0) if number not in found]
    if missing or not found:
        raise DataError(f"parts are missing: {', '.join(missing) or 'all'}", where=", ".join(map(str, dirs)))
    in_order = [found[number] for number in sorted(found)]
    for dir, manifest in in_order[1:]:
        _check_same(in_order[0], (dir, manifest))
    return dict(in_order)


def _part(manifest: Mapping[str, Any], dir: Path) -> tuple[int, int]:
    part = manifest.get(PART)
    try:
        number, of = map(int, str(part).split("/"))
    except ValueError:
        number = of = 0
    if not 0 <= number < of or BASE not in manifest:
        hint = "make parts with `python -m dllm regenerate --part i/n`"
        raise DataError("these responses are no part of a larger regeneration", where=str(dir), hint=hint)
    return number, of


def _check_same(one: tuple[Path, dict[str, Any]], other: tuple[Path, dict[str, Any]]) -> None:
    (first, left), (dir, right) = one, other
    for key in sorted((left.keys() | right.keys()) - OWN_KEYS):
        if left.get(key) != right.get(key):
            what = f"{key} differs: {_short(right.get(key))} here, {_short(left.get(key))} in {first}"
            raise DataError(what, where=str(dir), hint=_ONE_WORK)
    models = [manifest.get("made", {}).get("served") or {} for manifest in (left, right)]
    for key in SERVED_KEYS:
        here, there = models[1].get(key), models[0].get(key)
        if all(models) and here != there:
            what = f"the servers' {key} differs: {_short(here)} here, {_short(there)} in {first}"
            raise DataError(what, where=str(dir), hint=_ONE_WORK)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:56]} ..."


def _merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counts = sum((_counts(part) for part in parts), ManifestCounts())
    made = [part.get("made", {}) for part in parts]
    kept = (PART, "fingerprint", "rows", "tokens", "made")
    return {
        **{key: value for key, value in parts[0].items() if key not in OWN_KEYS},
        **counts.to_json(),
        "fingerprint": parts[0][BASE],
        PART: None,
        "parts": [{key: part[key] for key in kept if key in part} for part in parts],
        # Parts may have run in parallel, so this is the sum of their times and no wall time.
        "made": {"seconds": round(sum(each.get("seconds", 0.0) for each in made), 3)},
        "shards": [entry for entries in _renamed(parts) for entry in entries],
    }


def _counts(part: Mapping[str, Any]) -> ManifestCounts:
    try:
        return ManifestCounts.from_json(part)
    except (KeyError, TypeError) as error:
        where = f"the manifest of part {part[PART]}"
        raise DataError(f"no counts: {error}", where=where, hint="regenerate the part again") from None


def _renamed(parts: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [
        [{**entry, "file": f"part-{number:03d}-{entry['file']}"} for entry in part["shards"]]
        for number, part in enumerate(parts)
    ]


def _is_there_already(out: Path, merged: Mapping[str, Any], names: set[str]) -> bool:
    """Return whether `out` holds the merged result; files of a killed merge are accepted, others are an error."""
    if not out.exists():
        return False
    if (out / MANIFEST).exists():
        if shards.read_manifest(out) == merged:
            return True
        raise DataError("the folder holds other responses", where=str(out), hint="name an empty one")
    ours = names | {f"{name}.tmp" for name in (*names, MANIFEST)}
    for path in out.iterdir():
        if path.name not in ours:
            raise DataError(f"the folder is not empty: it holds {path.name}", where=str(out), hint="name an empty one")
    return False


def _link(source: Path, path: Path) -> None:
    try:
        atomic_link(source, path)
    except FileNotFoundError:
        raise DataError("the part lacks this shard", where=str(source), hint="regenerate the part again") from None
