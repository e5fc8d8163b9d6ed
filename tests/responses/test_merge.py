"""Parts make the whole, by links and sums alone; what does not fit is refused and leaves nothing behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllm.errors import DataError
from dllm.responses import merge as merging
from dllm.responses import shards
from dllm.responses.counts import ManifestCounts
from dllm.responses.merge import merge
from dllm.responses.verify import verify
from tests.responses.test_verify import ROWS, row, write


def part(folder: Path, number: int, of: int = 3, **about: Any) -> Path:
    """Make one part: each prompt has two turns, and both are in one part."""
    folder.mkdir(parents=True)
    rows = [each for each in ROWS if int(each.prompt_id, 16) % of == number]
    refused = [{"prompt_id": f"ff{number:02x}", "sample": 0, "turn": 0, "reason": "400"}]
    told = {"fingerprint": f"own {number}", "fingerprint_base": "base", "part": f"{number}/{of}", "thinking": "off"}
    made = {"seconds": 1.5 + number, "served": {"model": "m", "urls": [f"http://{number}"]}}
    return write(folder, rows, refused, **{**told, "made": made, **about})


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return [part(tmp_path / f"part{number}", number) for number in range(3)]


def test_the_union_is_the_whole_row_for_row_and_no_byte_is_written_twice(parts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "whole"
    merged = merge([parts[2], parts[0], parts[1]], out)
    assert merged == shards.read_manifest(out)
    verify(out)
    assert sorted(shards.read_rows(out), key=lambda r: (r.prompt_id, r.turn)) == ROWS
    assert merged["shards"][0]["file"] == "part-000-shard-00000.parquet"
    for number, folder in enumerate(parts):
        assert (out / f"part-{number:03d}-shard-00000.parquet").samefile(folder / "shard-00000.parquet")
    counts = ManifestCounts.from_json(merged)
    assert (counts.rows, counts.rejected) == (25, 3)
    assert replace(counts, rejected=0) == ManifestCounts.of(ROWS)
    assert (merged["fingerprint"], merged["part"], merged["thinking"]) == ("base", None, "off")
    assert [each["part"] for each in merged["parts"]] == ["0/3", "1/3", "2/3"] and merged["made"]["seconds"] == 7.5
    assert len((out / "rejected.jsonl").read_text().splitlines()) == 3


def test_one_part_alone_and_an_empty_part_will_do(tmp_path: Path) -> None:
    merge([part(tmp_path / "one", 0, of=1)], tmp_path / "whole")
    assert shards.read_rows(tmp_path / "whole") == ROWS
    (tmp_path / "empty").mkdir()
    about = {"fingerprint_base": "base", "thinking": "off"}
    whole = [write(tmp_path / "empty", [], [], part="0/2", **about), tmp_path / "full"]
    whole[1].mkdir()
    write(whole[1], ROWS, part="1/2", **about)
    merge(whole, tmp_path / "both")
    assert shards.read_rows(tmp_path / "both") == ROWS


@pytest.mark.parametrize(
    ("about", "line"),
    [
        ({"part": None}, "no part of a larger regeneration"),
        ({"part": "3/3"}, "no part of a larger regeneration"),
        ({"part": "0/3"}, "part 0/3 is given twice"),
        ({"part": "2/4"}, "another partition than the parts of 3"),
        ({"fingerprint_base": "other"}, "fingerprint_base differs: other here, base in"),
        ({"thinking": "on"}, "thinking differs: on here, off in"),
        ({"sampling": {"seed": 1}}, r"sampling differs: \{'seed': 1\} here, None in"),
        ({"made": {"served": {"model": "other"}}}, "the servers' model differs: other here, m in"),
    ],
)
def test_what_does_not_fit_is_refused_and_named(parts: list[Path], tmp_path: Path, about: Any, line: str) -> None:
    odd = part(tmp_path / "odd", 2, **about)
    with pytest.raises(DataError, match=line) as caught:
        merge([*parts[:2], odd], tmp_path / "whole")
    assert "odd" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "whole").exists()


def test_missing_parts_are_named(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"parts are missing: 0/3, 2/3"):
        merge(parts[1:2], tmp_path / "whole")
    (parts[0] / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no finished responses.*part0"):
        merge(parts, tmp_path / "whole")


def test_a_folder_with_anything_else_in_it_is_left_alone(parts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "whole"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"not empty: it holds notes\.txt"):
        merge(parts, out)
    with pytest.raises(DataError, match="holds other responses"):
        merge(parts, parts[0])
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_broken_off_it_is_finished_by_the_next_call_and_then_left_alone(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "whole"

    def no_power(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merging, "atomic_write", no_power)
        with pytest.raises(KeyboardInterrupt):
            merge(parts, out)
    (out / "part-001-shard-00000.parquet.tmp").write_bytes(b"half")
    with pytest.raises(DataError, match="no finished responses"):
        shards.read_rows(out)
    merge(parts, out)
    verify(out)
    assert not list(out.glob("*.tmp"))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    merge(parts, out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_lost_shard_is_named(parts: list[Path], tmp_path: Path) -> None:
    (parts[1] / "shard-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"lacks this shard.*part1/shard-00000\.parquet"):
        merge(parts, tmp_path / "whole")


def test_on_another_disk_shards_are_copied(parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def no_links(source: Path, path: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))

    monkeypatch.setattr(os, "link", no_links)
    merge(parts, tmp_path / "whole")
    verify(tmp_path / "whole")
    assert not (tmp_path / "whole/part-000-shard-00000.parquet").samefile(parts[0] / "shard-00000.parquet")


def test_a_merger_that_holds_a_row_twice_does_not_verify(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        write(tmp_path / str(number), [row(1)], [], fingerprint_base="b", part=f"{number}/2")
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "whole")
    with pytest.raises(DataError, match=r"occurs twice.*part-001-shard-00000\.parquet"):
        verify(tmp_path / "whole")
    assert json.loads((tmp_path / "whole/manifest.json").read_text())["rows"] == 2
