"""Texts to ids and back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.config.params import Target
from dllm.lm_eval.texts import cut, encode, encode_pair, windows
from dllm.models.targets import load_tokenizer

PREFIX = 1


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Target(model="builtin:tiny"))


def test_white_space_goes_with_what_follows_it(tokenizer) -> None:
    given, scored = encode_pair(tokenizer, "There is no ", "water", PREFIX)
    assert tokenizer.decode(given) == "There is no"
    assert tokenizer.decode(scored) == " water"
    assert (given, scored) == encode_pair(tokenizer, "There is no", " water", PREFIX)


@pytest.mark.parametrize("context", ["", " ", "\n"])
def test_an_empty_context_is_one_token(tokenizer, context) -> None:
    given, scored = encode_pair(tokenizer, context, "water", PREFIX)
    assert given == [PREFIX]
    assert tokenizer.decode(scored) == context + "water"


def test_a_continuation_that_begins_with_the_prefix_needs_no_other(tokenizer) -> None:
    first = tokenizer.convert_ids_to_tokens(PREFIX)
    assert encode_pair(tokenizer, "", first + "water", PREFIX) == ([PREFIX], encode(tokenizer, "water"))


def test_a_token_that_would_span_both_texts_loses_nothing(tokenizer) -> None:
    whole = encode(tokenizer, "water")
    assert len(whole) == 1
    given, scored = encode_pair(tokenizer, "wat", "er", PREFIX)
    assert tokenizer.decode(given) + tokenizer.decode(scored) == "water"
    assert scored


@settings(max_examples=40)
@given(st.integers(0, 40), st.integers(2, 9))
def test_each_token_is_scored_once(number, longest) -> None:
    ids = list(range(100, 100 + number))
    pairs = windows(ids, PREFIX, longest)
    assert [token for _, scored in pairs for token in scored] == ids
    text = [PREFIX, *ids]
    for before, scored in pairs:
        end = text.index(scored[-1]) + 1
        assert text[end - len(before) - len(scored) : end] == [*before, *scored]  # its own context, no other
        assert len(before) >= 1 and len(before) + len(scored) <= longest


def test_the_first_stop_string_by_position_ends_the_text(tokenizer) -> None:
    ids = encode(tokenizer, "one two three four")
    assert cut(tokenizer, ids, ["three", "two"]) == "one "
    assert cut(tokenizer, ids, ["five", "", "two"]) == "one "
    assert cut(tokenizer, ids, []) == "one two three four"
    assert cut(tokenizer, ids, ["o"]) == ""


def test_special_tokens_stop_a_text_and_are_not_in_it(tokenizer) -> None:
    ids = encode(tokenizer, "one<|im_start|> two<|endoftext|> three<|im_end|>")
    assert cut(tokenizer, ids, ["<|endoftext|>"]) == "one two"
    assert cut(tokenizer, ids, []) == "one two three"
