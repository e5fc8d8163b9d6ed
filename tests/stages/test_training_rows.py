"""Rows on their way into training and evaluation: streamed, so that memory does not grow with the data."""

import weakref
from pathlib import Path

import pytest

from dllm.config.params import Target, Train
from dllm.methods.diffusion.evaluate import write_heldout
from dllm.responses import shards
from dllm.responses.shards import Row, iter_rows
from dllm.stages.training_rows import read_splits
from tests.responses.shard_folder import write_rows


def row(number: int, split: str) -> Row:
    words = f"both {split} {split}-{number}"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]
    ids = [20 + number % 70, 21, 22, 23]
    return Row(f"{(number * 7919) % 10**6:016x}", 0, "made-up", split, turns, [10, 11, 12], ids, "stop", len(ids))


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    folder = tmp_path / "out" / "regenerate"
    folder.mkdir(parents=True)
    rows = [row(number, "heldout" if number % 5 == 0 else "train") for number in range(90)]
    write_rows(rows, folder, shard_size=20, about={})
    return folder


@pytest.fixture
def most_alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the training rows that are in memory at one time."""
    alive: weakref.WeakSet[Row] = weakref.WeakSet()
    counts = [0]

    class Counted(Row):
        __hash__ = object.__hash__

        def __init__(self, **values: object) -> None:
            super().__init__(**values)  # type: ignore[arg-type]
            if self.split == "train":
                alive.add(self)
                counts[0] = max(counts[0], len(alive))

    monkeypatch.setattr(shards, "Row", Counted)
    return counts


def test_training_rows_become_examples_one_by_one(responses: Path, most_alive: list[int]) -> None:
    train, heldout = read_splits(responses, Target(model="builtin:tiny"), Train(validation_samples=5))
    assert len(train.kept) == 72 and 1 <= most_alive[0] <= 2
    ids = sorted(each.prompt_id for each in iter_rows(responses, "heldout"))
    assert [example.id.split("-")[0] for example in heldout.kept] == ids[:5]


def test_evaluation_gets_heldout_rows_and_the_words_that_training_has_of_them(
    responses: Path, tmp_path: Path, most_alive: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllm.methods.diffusion.evaluate.SHARD_ROWS", 7)
    files = write_heldout(responses, tmp_path / "evaluation")
    assert set(files) == {"manifest.json", "known_words.json", *(f"shard-0000{index}.parquet" for index in range(3))}
    assert all(path == tmp_path / "evaluation" / name for name, path in files.items())
    assert 1 <= most_alive[0] <= 2
    copied = [vars(each) for each in iter_rows(tmp_path / "evaluation", "heldout")]
    assert copied == [vars(each) for each in iter_rows(responses, "heldout")] and len(copied) == 18
    assert files["known_words.json"].read_text() == '["both"]\n'
    before = {name: path.read_bytes() for name, path in files.items()}
    again = write_heldout(responses, tmp_path / "evaluation")
    assert {name: path.read_bytes() for name, path in again.items()} == before
