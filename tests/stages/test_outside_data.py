"""Prompts outside data/, where DVC sees no change: `make run` and flows ask for them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dllm.config.params import Params
from dllm.stages import prepare
from dllm.stages.outside_data import changed
from tests.stages.test_prepare import params


@pytest.fixture(autouse=True)
def one_store(mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)


def write(path: Path, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": f"{path.stem} {n}"}) + "\n" for n in range(first, first + 9)))
    return path


@pytest.fixture
def project(tmp_path: Path) -> tuple[Params, Path]:
    root = tmp_path / "project"
    write(root / "data" / "watched.jsonl")
    write(root / "mine.jsonl")
    for name in ("a", "b"):
        write(tmp_path / "chats" / f"{name}.jsonl")
    names = ("data/watched.jsonl", "mine.jsonl", str(tmp_path / "chats"))
    return params({"name": "aime"}, *({"name": name} for name in names)), root


def test_every_change_is_named_and_nothing_else(project: tuple[Params, Path]) -> None:
    asked, root = project
    chats = root.parent / "chats"
    assert changed(asked, root) == [], "prepare has not run"
    prepare.run(asked, root)
    assert changed(asked, root) == []
    write(root / "data" / "watched.jsonl", 1)  # DVC sees it
    os.utime(chats / "a.jsonl")  # the same bytes
    assert changed(asked, root) == []
    write(chats / "b.jsonl", 1)
    write(chats / "c.jsonl")
    write(root / "mine.jsonl", 1)
    assert changed(asked, root) == [f"{chats}/b.jsonl", f"{chats}/c.jsonl", "mine.jsonl/mine.jsonl"]
    prepare.run(asked, root)
    assert changed(asked, root) == []
    (chats / "a.jsonl").unlink()
    assert changed(asked, root) == [f"{chats}/a.jsonl"]


def test_prepare_says_which_sources_dvc_does_not_watch(
    project: tuple[Params, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    asked, root = project
    prepare.run(asked, root)
    said = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if "dvc repro" in line]
    assert said == ["mine.jsonl", str(root.parent / "chats")]
