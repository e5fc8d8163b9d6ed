"""Rows on a terminal and off it: what is marked is what training supervises."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dllm.cli.show import CUT, GIVEN, SUPERVISED, header, parts, select, show
from dllm.config.params import Target
from dllm.errors import DataError
from dllm.models.targets import load_tokenizer
from dllm.prompts.template import prompt_ids, stop_ids
from dllm.responses.shards import Row
from dllm.training.batches import collate, make_examples
from tests.responses.shard_folder import write_rows


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Target(model="builtin:tiny"))


def row(tokenizer, n: int = 0, said: str = "zwölf [or so]") -> Row:
    asked = [{"role": "user", "content": f"how many? {n}"}]
    answer = [*tokenizer(said, add_special_tokens=False)["input_ids"], *stop_ids(tokenizer)]
    messages = [*asked, {"role": "assistant", "content": said}]
    ids = prompt_ids(tokenizer, asked)
    return Row(f"{n:016x}", 0, "s", "train", messages, ids, answer, "stop", len(answer))


def printed(tokenizer, rows: list[Row], *, colours: bool = False, max_length: int = 512, tokens: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=colours, color_system="standard" if colours else None, width=40)
    show(enumerate(rows), tokenizer, console, max_length=max_length, tokens=tokens)
    return file.getvalue()


@pytest.mark.parametrize("max_length", [3, 12, 20, 512])
def test_the_parts_are_the_loss_mask_of_training(tokenizer, max_length: int) -> None:
    one = row(tokenizer)
    found = [(kind, id) for kind, ids in parts(one, max_length) for id in ids]
    assert [id for _, id in found] == one.prompt_ids + one.answer_ids
    assert [kind == CUT for kind, _ in found] == [place >= max_length for place in range(len(found))]
    try:
        examples = make_examples([one], max_length).kept
    except DataError:
        assert all(kind != SUPERVISED for kind, _ in found)
        return
    _, mask = collate(examples)
    assert [kind == SUPERVISED for kind, _ in found if kind != CUT] == mask[0].tolist()
    assert max_length < 20 or (GIVEN in dict(found) and SUPERVISED in dict(found))


def test_without_colours_the_supervised_part_stands_in_brackets(tokenizer) -> None:
    out = printed(tokenizer, [row(tokenizer)])
    assert "\x1b" not in out
    assert "assistant\n[zwölf [or so]<|im_end|>]\n" in out and "[<|im_start|>" not in out


def test_with_colours_there_are_no_brackets_and_the_answer_is_green(tokenizer) -> None:
    out = printed(tokenizer, [row(tokenizer)], colours=True)
    assert "\x1b[1;32mzwölf [or so]<|im_end|>\x1b[0m" in out


def test_the_header_says_what_the_row_is_and_long_lines_stay_lines(tokenizer) -> None:
    one = replace(row(tokenizer), turn=2, flags=["length", "repetition"], tools=[{}], finish_reason="length")
    line = header(7, one)
    for part in ("row 7", f"prompt {one.prompt_id} sample 0 turn 2", "train", "length", "1 tools", "tokens"):
        assert part in line
    assert line.endswith("flags: length, repetition")
    assert printed(tokenizer, [one]).splitlines()[0] == header(0, one)


def test_tokens_are_shown_one_by_one_with_their_ids(tokenizer) -> None:
    one = row(tokenizer)
    out = printed(tokenizer, [one], tokens=True)
    assert all(f"{id}:{tokenizer.decode([id])!r}" in out for id in one.prompt_ids + one.answer_ids)


def test_what_is_cut_or_too_short_to_train_on_is_said(tokenizer) -> None:
    one = row(tokenizer)
    out = printed(tokenizer, [one], max_length=len(one.prompt_ids) + 3)
    assert "<cut " in out and "not trained on" not in out
    assert "not trained on" in printed(tokenizer, [one], max_length=len(one.prompt_ids) + 1)


def test_a_row_cannot_steer_the_terminal(tokenizer) -> None:
    out = printed(tokenizer, [row(tokenizer, said="a\x1b[2Jb\rc\x7f")])
    assert "\x1b" not in out and "\r" not in out and "␛[2Jb␍c␡" in out


def test_rows_are_found_by_number_by_prompt_and_from_the_start(tokenizer, tmp_path: Path) -> None:
    rows = [replace(row(tokenizer, n // 2), turn=n % 2) for n in range(25)]
    write_rows(rows, tmp_path, 10, {})
    assert list(select(tmp_path)) == list(enumerate(rows[:3]))
    assert list(select(tmp_path, limit=12)) == list(enumerate(rows[:12]))
    assert list(select(tmp_path, row=17)) == [(17, rows[17])]
    assert list(select(tmp_path, prompt=f"{6:016x}")) == [(12, rows[12]), (13, rows[13])]
    assert len(list(select(tmp_path, prompt="0000", limit=99))) == 25
    for wanted in ({"row": 25}, {"prompt": "ff"}):
        with pytest.raises(DataError, match=r"no row (25|of a prompt ff) among 25 rows"):
            list(select(tmp_path, **wanted))  # type: ignore[arg-type]
    (tmp_path / "shard-00000.parquet").unlink()
    assert list(select(tmp_path, row=20)) == [(20, rows[20])], "other shards are not read"
