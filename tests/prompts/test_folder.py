"""Which files of a folder are read: those of the split, and all that their numbers speak of."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dllm.errors import ConfigError, DataError
from dllm.prompts.files import folder

ROW = json.dumps({"messages": "Which tree is this?"}) + "\n"


def read(path: Path, names: list[str], split: str = "train") -> list[str]:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(ROW)
    found, passed_over = folder.files(path, split, "x")
    assert sorted([*found, *passed_over]) == sorted(names)
    return sorted(found)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["chats.jsonl", "test.jsonl"], ["chats.jsonl"]),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["test.jsonl"], ["test.jsonl"]),
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
    ],
)
def test_files_of_another_split_stay_out_and_are_named(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    assert read(tmp_path, names) == expected


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("train.jsonl", "eval.jsonl", "eval"),
        ("train-0.jsonl", "test-0.jsonl", "test"),
        ("train_0.jsonl", "validation_0.jsonl", "validation"),
        ("gsm_train.jsonl.gz", "gsm_test.jsonl.gz", "test"),
        ("train2.jsonl", "dev2.jsonl", "dev"),
        ("c4-train.00000-of-00001.json", "c4-validation.00000-of-00001.json", "validation"),
        ("train-000000-of-000001.jsonl", "test-000000-of-000001.jsonl", "test"),
        ("Train-00000-of-00001-1ab.jsonl", "Test-00000-of-00001-2cd.jsonl", "test"),
        ("Train/a.jsonl", "Test/a.jsonl", "test"),
        ("training/a.jsonl", "testing/a.jsonl", "testing"),
        ("training.jsonl", "evaluation.jsonl", "evaluation"),
        ("main/train/0000.jsonl", "main/test/0000.jsonl", "test"),
        ("partial-train/a.jsonl", "partial-val/a.jsonl", "validation"),
        ("train/data-00000-of-00001.jsonl", "eval/data-00000-of-00001.jsonl", "eval"),
        ("train/contest.jsonl", "test/a.jsonl", "test"),
        ("train/a_test_b.jsonl", "eval/training_b.jsonl", "eval"),
        ("contest.jsonl", "test.jsonl", "test"),
        ("train.jsonl", "heldout.jsonl", "heldout"),
        ("chats.jsonl", "chats_held_out.jsonl", "held_out"),
        ("chats.jsonl", "hold-out/chats.jsonl", "heldout"),
    ],
)
def test_splits_have_many_names(tmp_path: Path, train: str, other: str, split: str) -> None:
    assert read(tmp_path, [train, other]) == [train]
    assert read(tmp_path, [train, other], split) == [other]


def test_a_split_s_own_name_comes_before_others_of_its_meaning(tmp_path: Path) -> None:
    names = ["train.jsonl", "training/more.jsonl", "val.jsonl", "dev.jsonl", "eval.jsonl", "test.jsonl"]
    for split, expected in {
        "train": ["train.jsonl", "training/more.jsonl"],
        "val": ["val.jsonl"],
        "validation": ["dev.jsonl", "val.jsonl"],
        "test": ["test.jsonl"],
        "evaluation": ["eval.jsonl", "test.jsonl"],
    }.items():
        assert read(tmp_path, names, split) == expected
    with pytest.raises(ConfigError, match="splits dev, eval, test, train, training, val, none of sft"):
        read(tmp_path, names, "sft")


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train-00000-of-00002.jsonl"], r"train-\*-of-00002 the numbers 00001 are missing"),
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "the numbers 00001 are missing"),
        (["part.000001-of-000009.jsonl"], "the numbers 000000, 000002, 000003 and 5 more are missing"),
        (["d/x-00002-of-00002.jsonl"], r"d/x-\*-of-00002 the numbers 00001 are missing"),
        (["a/train-00000-of-00002.jsonl", "b/train-00001-of-00002.jsonl"], "00001 are missing"),
        (["train-00001-of-99999999.jsonl"], "and 99999995 more"),
    ],
)
def test_a_missing_shard_is_named(tmp_path: Path, names: list[str], missing: str) -> None:
    with pytest.raises(DataError, match=missing):
        read(tmp_path, names)


def test_whole_series_and_those_of_other_splits_are_not_refused(tmp_path: Path) -> None:
    whole = ["train-00000-of-00002-1ab.jsonl", "train-00001-of-00002-2cd.jsonl"]
    from_one = ["more/train-00001-of-00002.jsonl", "more/train-00002-of-00002.jsonl"]
    assert read(tmp_path, [*whole, *from_one, "test-00000-of-00002.jsonl"]) == sorted([*whole, *from_one])


@pytest.mark.parametrize("other", ["dataset_infos.json", "more.jsonl", "b/data-00000-of-00001.jsonl"])
def test_one_word_in_numbered_names_is_no_split(tmp_path: Path, other: str) -> None:
    assert read(tmp_path, ["data-00000-of-00001.jsonl", other]) == sorted(["data-00000-of-00001.jsonl", other])


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: good/*.jsonl
  - split: test
    path: [bad/**, "kept.jsonl"]
---
# Trees
"""


def test_the_splits_that_a_dataset_s_card_names_come_before_those_of_names(tmp_path: Path) -> None:
    names = ["good/test.jsonl", "bad/a.jsonl", "bad/b/train.jsonl", "kept.jsonl"]
    read(tmp_path, names, "test")
    (tmp_path / "README.md").write_text(CARD)
    for split, expected in {"train": names[:1], "test": names[1:]}.items():
        found, passed_over = folder.files(tmp_path, split, "x")
        assert sorted(found) == sorted(expected) and set(passed_over) == {*names, "README.md"} - set(expected)


ASSIGNED = {
    "braces": ("[{split: train, path: 'data/{a,b}.jsonl'}, {split: test, path: 'data/{c,d}.jsonl'}]", "data/a data/b"),
    "any folder": ("[{split: test, path: '**/b.jsonl'}, {split: train, path: '*.jsonl'}]", "a"),
    "a folder": ("[{split: train, path: a}, {split: test, path: b/}]", "a/x"),
    "a mapping": ("{train: a, test: [b]}", "a/x"),
    "a text": ("data/a.jsonl", "data/a"),
    "a list": ("[data/a.jsonl, ./data/b.jsonl]", "data/a data/b"),
    "one level": ("'data/*'", "data/a data/b data/c data/d"),
    "letters": ("'data/[!a-c].jsonl'", "data/d"),
}


@pytest.mark.parametrize(("files", "expected"), ASSIGNED.values(), ids=ASSIGNED)
def test_every_form_in_which_a_card_lists_files_is_read_and_others_are_not(
    tmp_path: Path, files: str, expected: str
) -> None:
    for name in ("a", "b", "data/a", "data/b", "data/c", "data/d", "a/x", "b/x", "data/deep/e"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(ROW)
    (tmp_path / "README.md").write_text(f"---\nconfigs: [{{config_name: default, data_files: {files}}}]\n---\n")
    found, passed_over = folder.files(tmp_path, "train", "x")
    assert sorted(found) == [f"{each}.jsonl" for each in expected.split()]
    assert passed_over["data/deep/e.jsonl"] == "not listed in README.md"
    (tmp_path / "README.md").write_text("---\nconfigs: [{data_dir: data, data_files: {train: a.jsonl}}]\n---\n")
    assert list(folder.files(tmp_path, "train", "x")[0]) == ["data/a.jsonl"]


def test_of_several_configurations_the_default_is_read_or_none(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(ROW)
    configs = "{config_name: one, data_files: a.jsonl}, {config_name: two, data_files: b.jsonl%s}"
    (tmp_path / "README.md").write_text(f"---\nconfigs: [{configs % ''}]\n---\n")
    with pytest.raises(ConfigError, match=r"README\.md has several configurations: one, two"):
        folder.files(tmp_path, "train", "x")
    (tmp_path / "README.md").write_text(f"---\nconfigs: [{configs % ', default: true'}]\n---\n")
    found, passed_over = folder.files(tmp_path, "train", "x")
    assert list(found) == ["b.jsonl"] and passed_over["a.jsonl"] == "not listed in README.md"


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.jsonl").write_text(ROW)
    real = os.scandir

    def scandir(path: str) -> Any:  # root, who runs the tests in containers, may list anything
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot list the folder: Permission denied .*locked"):
        folder.files(tmp_path, "train", "x")


@pytest.mark.parametrize(
    "card", ["# Trees\n", "---\nconfigs: [\n---\n", "---\nconfigs: 3\n---\n", "\xff", "---\n- a\n---\n"]
)
def test_a_card_that_names_no_splits_changes_nothing(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_text(card, encoding="latin-1")
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(ROW)
    found, passed_over = folder.files(tmp_path, "train", "x")
    assert list(found) == ["train.jsonl"] and set(passed_over) == {"README.md", "test.jsonl"}
