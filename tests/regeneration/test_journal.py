"""The journal of answers: what a kill, a full disk and a torn line leave behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.engines.engine import Response, request_key, request_origin, request_seed
from dllm.regeneration.journal import ResponseJournal

CALLS = ({"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}},)
ANSWERS = [
    Response(f"{n:016x}:{n % 3}:0", tuple(range(n)), f"zwölf\n{n}", "stop", CALLS if n % 2 else ()) for n in range(6)
]


def fill(path: Path, answers: list[Response] = ANSWERS) -> None:
    with ResponseJournal(path) as journal:
        for answer in answers:
            journal.append(answer)


def test_answers_are_found_again_by_key(tmp_path: Path) -> None:
    fill(tmp_path / "j")
    with ResponseJournal(tmp_path / "j") as journal:
        assert [journal.read(answer.key) for answer in ANSWERS] == ANSWERS
        assert len(journal) == 6
        assert "missing:0:0" not in journal


def test_an_answer_is_on_disk_before_the_next_is_asked_for(tmp_path: Path) -> None:
    with ResponseJournal(tmp_path / "j") as journal:
        journal.append(ANSWERS[1])
        assert (tmp_path / "j").read_bytes().endswith(b"\n")


def test_the_first_answer_to_a_key_counts(tmp_path: Path) -> None:
    with ResponseJournal(tmp_path / "j") as journal:
        journal.append(ANSWERS[2])
        journal.append(Response(ANSWERS[2].key, (9,), "later", "length"))
        assert journal.read(ANSWERS[2].key) == ANSWERS[2] and len(journal) == 1
    assert (tmp_path / "j").read_bytes().count(b"\n") == 1


def test_a_response_that_replaces_a_forgotten_one_counts_after_a_reopen(tmp_path: Path) -> None:
    first, second = (Response("0:0:0", (n,), str(n), "stop") for n in (1, 2))
    with ResponseJournal(tmp_path / "j") as journal:
        journal.append(first)
        journal.forget(first.key)
        journal.append(second)
    with ResponseJournal(tmp_path / "j") as journal:
        assert journal.read(first.key) == second
        assert len(journal) == 1


@given(cut=st.integers(min_value=0, max_value=10_000))
def test_cut_anywhere_it_holds_every_whole_line_and_goes_on(tmp_path_factory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "j"
    fill(path)
    whole = path.read_bytes()
    cut %= len(whole) + 1
    os.truncate(path, cut)
    survivors = whole[:cut].count(b"\n")
    with ResponseJournal(path) as journal:
        assert [answer.key in journal for answer in ANSWERS] == [n < survivors for n in range(6)]
        for answer in ANSWERS:
            journal.append(answer)
    assert path.read_bytes() == whole


def test_a_damaged_line_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "j"
    fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"\0" * (len(lines[1]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))
    with ResponseJournal(path) as journal:
        assert ANSWERS[1].key not in journal
        journal.append(ANSWERS[1])
        assert [journal.read(answer.key) for answer in ANSWERS] == ANSWERS
    assert "1 damaged lines" in caplog.text


def test_a_full_disk_costs_only_the_line_it_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    fill(path, ANSWERS[:3])
    real = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data[:-5])

    with ResponseJournal(path) as journal:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append(ANSWERS[3])
        monkeypatch.undo()
    with ResponseJournal(path) as journal:
        assert len(journal) == 3
        journal.append(ANSWERS[3])
        assert journal.read(ANSWERS[3].key) == ANSWERS[3]


def test_seeds_are_a_request_s_own() -> None:
    keys = [(id, sample, turn) for id in ("a" * 16, "b" * 16) for sample in range(25) for turn in range(2)]
    seeds = {request_seed(0, *key) for key in keys}
    assert len(seeds) == 100 and all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(1, *keys[0]) != request_seed(0, *keys[0])
    assert request_seed(0, "a" * 16, 0) == 575992124
    assert request_origin(request_key("a" * 16, 12, 3)) == ("a" * 16, 12, 3)
