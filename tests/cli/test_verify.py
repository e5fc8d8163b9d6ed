"""verify sees what DVC itself overlooks: a file of its cache with other bytes and the old time of change."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from dllm.cli.verify import verify
from dllm.errors import DataError


def _object(root: Path, data: bytes, suffix: str = "") -> Path:
    name = hashlib.md5(data, usedforsecurity=False).hexdigest()
    path = root / ".dvc" / "cache" / "files" / "md5" / name[:2] / (name[2:] + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_damage_in_dvcs_cache_is_named_with_a_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _object(tmp_path, b"shard " * 99)
    _object(tmp_path, b"[]", ".dir")
    verify(tmp_path)
    before = path.stat()
    path.write_bytes(b"Shard " * 99)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    capsys.readouterr()
    with pytest.raises(DataError, match=r"1 of \d+ are damaged.*DVC's cache"):
        verify(tmp_path)
    assert f"`rm -f {path.relative_to(tmp_path)}`, then `dvc repro -sf STAGE`" in capsys.readouterr().out
