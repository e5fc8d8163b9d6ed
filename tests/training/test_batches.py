"""Answers become sequences of which only the target's own words are supervised."""

import pytest

from dllm.errors import DataError
from dllm.responses.shards import Row
from dllm.training.batches import collate, make_examples


def row(prompt: list[int], answer: list[int], sample: int = 0) -> Row:
    return Row("00aa", sample, "gsm8k", "train", [], prompt, answer, "stop", len(answer))


def test_padding_and_prompt_are_unsupervised() -> None:
    examples = make_examples([row([5, 6], [7, 8, 9]), row([5], [3, 4], sample=1)], max_length=8)
    assert [example.id for example in examples.kept] == ["00aa-0-0", "00aa-1-0"]
    input_ids_BS, loss_mask_BS = collate(examples.kept)
    assert input_ids_BS.tolist() == [[5, 6, 7, 8, 9], [5, 3, 4, 0, 0]]
    assert loss_mask_BS.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]


def test_long_rows_are_cut_and_rows_left_without_words_dropped_and_both_counted() -> None:
    rows = [row([1] * 4, [2] * 4), row([1] * 6, [2] * 4), row([1], [2]), row([1], [])]
    examples = make_examples(rows, max_length=6)
    assert [(len(e), e.prompt_length) for e in examples.kept] == [(6, 4)]
    assert (examples.dropped, examples.cut) == (3, 2)


def test_none_left_is_an_error_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"none of 1 rows.*train\.max_length.*raise"):
        make_examples([row([1] * 9, [2, 3])], max_length=9)
