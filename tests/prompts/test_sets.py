"""Published prompt sets: instructions of the papers, commits of the hub, and what training prompts already ask."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dllm.config.params import Source
from dllm.errors import ConfigError, DataError
from dllm.prompts import sets
from dllm.prompts.sets import HubSet
from dllm.registry import PROMPT_SETS


@pytest.mark.parametrize(
    ("name", "count", "begin", "end"),
    [
        ("gsm8k", 1319, "", "\nPlease reason step by step, and put your final answer within \\boxed{}."),
        ("humaneval", 164, "Write a solution to the following problem", "\n```"),
    ],
)
def test_sets_of_packages_stand_in_the_instructions_of_papers(
    tmp_path: Path, name: str, count: int, begin: str, end: str
) -> None:
    prompts = sets.read(Source(name=name, limit=3), tmp_path)
    assert len(prompts) == count and [p.id for p in prompts] == sorted({p.id for p in prompts})
    texts = [prompt.messages[0]["content"] for prompt in prompts]
    assert all(text.startswith(begin) and text.endswith(end) for text in texts)
    assert all(begin not in PROMPT_SETS[name].bare(text) or not begin for text in texts)
    (digest,) = sets.identity(Source(name=name), tmp_path).values()
    assert re.fullmatch("[0-9a-f]{64}", digest)


ROWS = {
    "math500": ({"problem": "What is {1}?", "answer": "x"}, "What is {1}?\nPlease reason step by step,"),
    "mbpp": ({"prompt": "Write a function.", "code": "x", "task_id": 2}, "Write a function."),
    "mt-bench": ({"prompt": ["First?", "Second?"], "category": "writing"}, "First?"),
    "alpaca": ({"instruction": "Sum up.", "input": "A text.", "text": "x"}, "Sum up.\n\nInput:\nA text."),
}


@pytest.mark.parametrize("name", [name for name, member in PROMPT_SETS.items() if isinstance(member, HubSet)])
def test_sets_of_the_hub_are_read_at_a_commit_like_any_dataset(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    # load_dataset takes a folder as it takes a hub id, so this is the hub's way without the hub.
    member, (row, text) = PROMPT_SETS[name], ROWS[name]
    assert re.fullmatch("[0-9a-f]{40}", member.dataset.revision)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repo").mkdir()
    (tmp_path / f"repo/{member.dataset.split}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    here = {"name": str(tmp_path / "repo"), "subset": None, "revision": None}
    monkeypatch.setattr(member, "dataset", member.dataset.model_copy(update=here))
    (prompt,) = sets.read(Source(name=name), tmp_path)
    assert prompt.messages[0]["content"].startswith(text) and prompt.source == name
    assert sets.identity(Source(name=name), tmp_path)["fingerprint"]


def test_offline_a_line_names_the_set_and_what_works_without_the_hub(tmp_path: Path) -> None:
    code = """
import pathlib
from dllm.config.params import Source
from dllm.errors import DataError
from dllm.prompts import sets
try:
    sets.identity(Source(name="math500"), pathlib.Path())
except DataError as error:
    print(error)
"""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=offline)
    (line,) = done.stdout.strip().splitlines()
    assert "HuggingFaceH4/MATH-500 at commit 6e4ed1a2a79a" in line and "evaluate.sets: math500" in line
    assert line.endswith("without the hub there are gsm8k, humaneval")


def test_a_set_may_be_a_source_and_a_wrong_name_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"messages": "Who?"}\n{"messages": "When?"}\n')
    assert len(sets.read(Source(name="mine.jsonl"), tmp_path)) == 2
    with pytest.raises(DataError, match=r"no such set \(evaluate\.sets: math-500\); did you mean math500\?"):
        sets.read(Source(name="math-500"), tmp_path)
    with pytest.raises(DataError, match=r"no such file or folder \(evaluate\.sets: x\.jsonl\)"):
        sets.read(Source(name="x.jsonl"), tmp_path)
    with pytest.raises(ConfigError, match=r"size 9 does not apply to a published set.*leave evaluate\.sets\[\]\.size"):
        sets.read(Source(name="gsm8k", size=9), tmp_path)
