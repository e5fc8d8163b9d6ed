"""Values in the names of runs: short, and different where the values are."""

import pytest

from dllm.config.brief import SHOWN, VALUE_CHARS, brief, brief_pairs


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, "2"),
        (True, "true"),
        (None, "null"),
        ("a text", "a text"),
        (["length", "empty"], "length+empty"),
        ([], "none"),
        ([{"name": "openai/gsm8k", "split": None, "limit": 3}, "aime"], "gsm8k(limit=3)+aime"),
    ],
)
def test_a_value_is_written_as_a_person_would(value: object, expected: str) -> None:
    assert brief(value) == expected


def test_values_that_differ_stay_apart_when_they_are_cut() -> None:
    cut = {brief(f"{'x' * VALUE_CHARS}{number}") for number in range(20)}
    assert len(cut) == 20 and {len(text) for text in cut} == {VALUE_CHARS}


def test_what_is_beyond_the_first_values_is_in_a_hash() -> None:
    values = {f"train.{key}": 1 for key in "abcde"}
    first, second = brief_pairs(values), brief_pairs(values | {"train.e": 2})
    assert first[:SHOWN] == second[:SHOWN] == ["a=1", "b=1", "c=1"]
    assert first[-1].startswith("+2 more~") and first[-1] != second[-1]
    assert brief_pairs({"train.seed": 1, "regenerate.seed": 2}) == ["train.seed=1", "regenerate.seed=2"]
