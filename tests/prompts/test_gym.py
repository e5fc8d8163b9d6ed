"""The source `reasoning-gym`, with the real package: the same questions in every process, with references."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm.config.params import Prepare, Source
from dllm.errors import ConfigError, DataError
from dllm.prompts import sources, stream
from dllm.prompts.gym import ReasoningGym
from dllm.prompts.references import is_right

DUMP = """
import json, pathlib, sys
from dllm.config.params import Source
from dllm.prompts import sources
asked = Source(name="reasoning-gym", subset=sys.argv[1], size=4, seed=3)
print(json.dumps([row.chat for row in sources.rows(asked, pathlib.Path())]))
print([name for name in sys.modules if name.startswith("reasoning_gym")])
"""


def gym(task: str | None = "gsm_symbolic", size: int | None = 40, seed: int | None = 1, **more: object) -> Source:
    return Source.model_validate({"name": "reasoning-gym", "subset": task, "size": size, "seed": seed, **more})


def test_questions_are_the_same_in_every_process_whatever_its_hash_seed() -> None:
    found = []
    for hash_seed in ("1", "2"):
        argv = [sys.executable, "-c", DUMP, "ransom_note"]  # a task that does depend on it
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
        questions, imported = done.stdout.splitlines()
        found.append(json.loads(questions))
        assert imported == "[]", "it is generated in a process of its own"
    assert found[0] == found[1] and len(set(found[0])) == 4


def test_questions_have_references_and_seeds_differ(tmp_path: Path) -> None:
    rows = list(sources.rows(gym(size=20), tmp_path))
    assert len(rows) == 20 and rows[6].place == "reasoning-gym:gsm_symbolic seed 1 question 7"
    assert not {row.chat for row in rows} & {row.chat for row in sources.rows(gym(size=20, seed=1000), tmp_path)}
    for row in rows:
        assert isinstance(row.chat, str) and isinstance(row.reference, str)
        assert is_right(f"3 apples and 4 make it. So the answer is {row.reference}.", row.reference)
        assert not is_right("The answer is 123456789.", row.reference)


def test_an_answer_of_several_lines_is_right_at_the_end_of_a_text(tmp_path: Path) -> None:
    (row,) = sources.rows(gym("mini_sudoku", size=1), tmp_path)
    assert row.reference.count("\n") == 3
    assert is_right(f"Row by row:\n{row.reference}\n", row.reference)
    assert not is_right(row.reference + "\n1 2 3 4", row.reference)


def test_it_is_mixed_with_others_each_with_its_limit_and_duplicates_left_out(tmp_path: Path) -> None:
    # A task of few questions, and a seed near the one before: both repeat questions.
    listed = [Source(name="gsm8k", limit=30), gym(limit=20), gym("coin_flip"), gym("coin_flip", seed=3)]
    prompts, counts = stream.collect(Prepare(sources=listed, heldout_fraction=0.2), tmp_path)
    found = {name: entry["train"] + entry["heldout"] for name, entry in counts["sources"].items()}
    assert found["gsm8k"] == 30 and found["reasoning-gym:gsm_symbolic"] == 20
    flips = counts["sources"]["reasoning-gym:coin_flip"]
    assert flips["rows"] == 80 and flips["duplicates"] == 80 - found["reasoning-gym:coin_flip"] > 0
    assert len({prompt.id for prompt in prompts}) == len(prompts) == sum(found.values())
    assert all(prompt.reference for prompt in prompts)


def test_what_determines_the_questions_is_recorded(tmp_path: Path) -> None:
    mark = sources.identity(gym(), tmp_path)
    assert mark["reasoning-gym"].startswith("0.1.") and mark["task"] == "gsm_symbolic"
    assert sources.identity(gym(None, None, None), tmp_path) == {**mark, "size": 1000, "seed": 0}


def test_an_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no task 'gsm-symbolik'.*did you mean gsm_symbolic\?") as caught:
        list(sources.rows(gym("gsm-symbolik"), tmp_path))
    assert "\n" not in str(caught.value)


def test_a_task_that_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be generated: ValueError: Seed must be.*pool_matrix"):
        list(sources.rows(gym("pool_matrix", seed=2**40), tmp_path))


def test_a_task_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no further question within 0 s.*reasoning-gym:gsm_symbolic"):
        list(ReasoningGym(deadline_s=0.0).rows(gym(), tmp_path))


def test_size_and_seed_are_for_what_is_generated(tmp_path: Path) -> None:
    for name in ("gsm8k", "nobody/nothing"):
        with pytest.raises(ConfigError, match=r"size 9 does not apply.*leave prepare\.sources\[\]\.size out"):
            list(sources.rows(Source(name=name, size=9), tmp_path))
    with pytest.raises(ConfigError, match=r"split 'test' does not apply to a built-in source"):
        list(sources.rows(gym(split="test"), tmp_path))
