"""A whole folder passes; whatever is changed in it is found and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllm.errors import DataError
from dllm.responses import shards
from dllm.responses.counts import ManifestCounts
from dllm.responses.shards import Row
from dllm.responses.verify import verify
from tests.responses.shard_folder import write_rows

STOP = 99


def row(n: int, **changes: Any) -> Row:
    """Make an answer; every third one is cut."""
    cut = n % 3 == 0
    made = Row(
        prompt_id=f"{n // 2:016x}",
        sample=0,
        turn=n % 2,
        source="s",
        split="heldout" if n % 5 == 0 else "train",
        messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        prompt_ids=[1, 2],
        answer_ids=[5, 6, 7] if cut else [5, 6, STOP],
        finish_reason="length" if cut else "stop",
        num_tokens=3,
        flags=["length"] if cut else [],
    )
    return replace(made, **changes)


REFUSED = [{"prompt_id": "00ff", "sample": 0, "turn": 1, "reason": "400"}]


def write(folder: Path, rows: list[Row], refused: list[dict[str, Any]] = REFUSED, **about: Any) -> Path:
    """Write a folder as regeneration does: every shard with its counts."""
    entries, total = [], ManifestCounts()
    for start in range(0, len(rows), 10):
        chunk = rows[start : start + 10]
        counts = ManifestCounts.of(chunk)
        counts.rejected = len(refused) if start == 0 else 0
        entry = shards.write_shard(chunk, folder / shards.shard_name(start // 10))
        entries.append({**entry, "counts": counts.to_json()})
        total += counts
    (folder / shards.REJECTED).write_text("".join(json.dumps(line) + "\n" for line in refused))
    shards.write_manifest(folder, {"schema": shards.SCHEMA, **about, **total.to_json(), "shards": entries})
    return folder


ROWS = [row(n) for n in range(25)]


def test_a_whole_folder_is_whole_and_what_was_checked_is_said(tmp_path: Path) -> None:
    found = verify(write(tmp_path, ROWS, stop_ids=[STOP]))
    assert found["shards"].startswith("3, sha256") and found["rows"].startswith("25, each")
    assert found["ends"] == "9 length, 16 stop" and found["flags"] == "9 length"
    assert found["rejected"].startswith("1 requests")


def test_one_without_counts_a_shard_and_without_refusals_is_whole_too(tmp_path: Path) -> None:
    write_rows(ROWS, tmp_path, 10, {})
    assert verify(tmp_path)["counts"].startswith("75 tokens")


CALL = {"id": "x", "type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize(
    "changed",
    [
        row(2, flags=["tool_mismatch"]),
        row(2, messages=[*row(2).messages[:1], {"role": "assistant", "content": "", "tool_calls": [CALL]}]),
        row(2, answer_ids=[5] * 40 + [STOP], num_tokens=41, flags=["repetition"]),
        row(3, answer_ids=[], num_tokens=0),
    ],
)
def test_what_is_odd_and_flagged_is_whole(tmp_path: Path, changed: Row) -> None:
    verify(write(tmp_path, [changed]))


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([*ROWS, row(3)], r"prompt 0+1 sample 0 turn 1 occurs twice.*shard-00002\.parquet row 5"),
        ([row(1, num_tokens=4)], "num_tokens is 4 for 3 ids"),
        ([row(1, finish_reason="eos")], "finish_reason is 'eos'"),
        ([row(1, messages=[{"role": "user", "content": "q"}])], "no context or no response"),
        ([row(1, prompt_ids=[])], "no context"),
        ([row(1, flags=["repetition"])], r"flags are \['repetition'\]"),
        ([row(3, flags=[])], r"flags are \[\], though the response has \['length'\]"),
        ([row(1, answer_ids=[], num_tokens=0)], "ends with stop has no stop id"),
        ([row(1), row(3, answer_ids=[5, 6, STOP])], "cut ends with the stop id 99.*row 1"),
        ([row(1, prompt_id="prompt")], "'prompt' is no prompt's id"),
    ],
)
def test_a_row_that_cannot_be_is_named_though_all_hashes_fit(tmp_path: Path, rows: list[Row], line: str) -> None:
    with pytest.raises(DataError, match=line) as caught:
        verify(write(tmp_path, rows))
    assert "\n" not in str(caught.value)


def test_stop_ids_of_the_manifest_are_held_against_the_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ends with id 99, which is no stop id"):
        verify(write(tmp_path, ROWS, stop_ids=[98]))


def _flip(folder: Path) -> None:
    path = folder / "shard-00001.parquet"
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        shards.write_manifest(folder, {name: value for name, value in manifest.items() if name != "seal"})

    return apply


def _other_columns(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "shard-00000.parquet"
    pq.write_table(pa.table({"text": ["a"] * 10}), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    _manifest(lambda manifest: manifest["shards"][0].update(sha256=digest))(folder)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda d: (d / "manifest.json").unlink(), "no finished responses"),
        (_flip, r"not the manifest's.*shard-00001\.parquet"),
        (lambda d: (d / "shard-00002.parquet").unlink(), r"cannot read the shard.*shard-00002\.parquet"),
        (_other_columns, r"other columns.*shard-00000\.parquet"),
        (lambda d: (d / "shard-00003.parquet").write_bytes(b""), r"does not list.*shard-00003\.parquet"),
        (_manifest(lambda m: m["shards"].pop()), r"does not list.*shard-00002\.parquet"),
        (_manifest(lambda m: m["shards"].append(m["shards"][0])), r"'shard-00000\.parquet' is listed twice"),
        (_manifest(lambda m: m["shards"][0].update(file="../x.parquet")), "lies elsewhere"),
        (_manifest(lambda m: m["shards"][0].pop("sha256")), "shard 0 has no file, rows and sha256"),
        (_manifest(lambda m: m["shards"].insert(0, 7)), "shard 0 has no file"),
        (_manifest(lambda m: m["shards"][1].update(rows=9)), r"rows than its manifest.*shard-00001"),
        (_manifest(lambda m: m["shards"][1]["counts"].update(tokens=31)), "tokens should be 30, the manifest says 31"),
        (_manifest(lambda m: m.update(rows=26)), "rows should be 25, the manifest says 26"),
        (_manifest(lambda m: m["splits"].update(train=21)), "splits should be .*20.*21"),
        (_manifest(lambda m: m.pop("flags")), "lacks counts"),
        (_manifest(lambda m: m.update(rejected=2)), "rejected should be 1, the manifest says 2"),
        (lambda d: (d / "rejected.jsonl").unlink(), "0 requests are listed, the manifest says 1"),
        (lambda d: (d / "rejected.jsonl").write_text("{}\n"), r"no prompt_id.*rejected\.jsonl:1"),
        (
            lambda d: (d / "rejected.jsonl").write_text(json.dumps({**REFUSED[0], "prompt_id": "01"})),
            r"prompt 01 sample 0 turn 1 was refused and also has a row.*rejected\.jsonl:1",
        ),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage: Callable[[Path], object], line: str) -> None:
    damage(write(tmp_path, ROWS))
    with pytest.raises(DataError, match=line) as caught:
        verify(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
