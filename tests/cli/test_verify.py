"""verify sees what DVC itself overlooks: a file of its cache with other bytes and the old time of change."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from rich.console import Console

from dllm.cli import verify as cli_verify
from dllm.cli.verify import verify
from dllm.config import recipe_book
from dllm.digests import sealed
from dllm.errors import DataError, DllmError
from dllm.models import hub
from dllm.tracking import provenance


def _object(root: Path, data: bytes, suffix: str = "") -> Path:
    name = hashlib.md5(data, usedforsecurity=False).hexdigest()
    path = root / ".dvc" / "cache" / "files" / "md5" / name[:2] / (name[2:] + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A project that has one of each thing that lies outside out/, by its name in the table."""
    params = recipe_book.load("tiny-dflash", ["target.model=me/mine", "register.store=kept"])
    recipe_book.write(tmp_path / "params.yaml", recipe_book.text_of(params, []))
    commit, blob = "0123456789abcdef0123456789abcdef01234567", b"weights " * 99
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("dllm.models.builtin.cache_root", lambda: tmp_path / "none")
    repo = tmp_path / "hub" / "models--me--mine"
    files = {
        "me/mine 01234567": repo / "blobs" / hashlib.sha256(blob).hexdigest(),
        "work/greedy": tmp_path / "work" / "greedy" / "k" / "a.json",
        "work/evaluate": tmp_path / "work" / "evaluate" / "f" / "parts" / "a.json",
        "work/tracking": tmp_path / "work" / "tracking" / "a.jsonl",
        "work/executions": tmp_path / "work" / "executions" / "a.json",
        "work/train": tmp_path / "work" / "train" / "f" / "training.jsonl",
        "mlartifacts": tmp_path / "mlartifacts" / "1" / "a.txt",
    }
    for name, path in files.items():
        path.parent.mkdir(parents=True)
        is_sealed = name in ("work/greedy", "work/evaluate")
        path.write_bytes(blob if "mine" in name else sealed({"token_ids": [1]}) if is_sealed else b"{}\n")
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "model.safetensors").symlink_to(files["me/mine 01234567"])
    kept = tmp_path / "kept" / "0123456789abcdef"
    kept.mkdir(parents=True)
    (kept / "config.json").write_text("{}")
    kept.rename(kept.with_name(provenance.digest(kept)[:16]))
    return files | {"kept": next((tmp_path / "kept").iterdir()) / "config.json"}


def states(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return the state of each thing, and check that damage is an error."""
    console = Console(width=400)
    hub.check_blobs.cache_clear()  # once a process
    try:
        verify(root, console)
        is_whole = True
    except DllmError:
        is_whole = False
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    found: dict[str, str] = {}
    for cells in rows:
        if len(cells) == 4 and cells[3]:
            found[cells[0]] = cells[3]
    assert is_whole == ("DAMAGED" not in found.values())
    return found


def test_what_lies_in_other_places_is_compared_and_what_has_no_digest_is_listed(
    tmp_path: Path, stored: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = states(tmp_path, capsys)
    named = {
        name: next(state for row, state in whole.items() if row.startswith(name[:16]))
        for name in stored
        if name != "kept"
    }
    compared = {"me/mine 01234567", "work/greedy", "work/evaluate"}
    assert named == {name: "ok" if name in compared else "no digests" for name in named}
    for name in (*compared, "kept"):
        data = stored[name].read_bytes()
        stored[name].write_bytes(data.replace(b"1", b"2").replace(b"weights", b"Weights") if name != "kept" else b"[]")
        assert "DAMAGED" in states(tmp_path, capsys).values(), name
        stored[name].write_bytes(data)
    (tmp_path / "params.yaml").write_text("a: [")
    assert states(tmp_path, capsys)["params.yaml"] == "DAMAGED"


def test_a_file_that_a_running_stage_removes_meanwhile_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    going = tmp_path / "work" / "train" / "state.json"
    going.parent.mkdir(parents=True)
    going.write_text("{}")
    listed = going.parent / "training.jsonl"
    listed.write_text("1\n")

    def gone(path: Path) -> int:
        going.unlink(missing_ok=True)
        return size(path)

    size = cli_verify._size
    monkeypatch.setattr(cli_verify, "_size", gone)
    verify(tmp_path)
    assert "work/train" in capsys.readouterr().out and not going.exists()


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
