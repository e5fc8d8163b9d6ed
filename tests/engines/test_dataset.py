"""The engine that asks nobody."""

import pytest

from dllm.config.params import Target
from dllm.engines.dataset import GivenEngine
from dllm.engines.engine import ListFeed, Refusal, Request, Response, request_key
from dllm.models import targets
from dllm.prompts import template as chat

ASKED = [{"role": "user", "content": "How many?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return targets.load_tokenizer(Target(model="builtin:tiny"))


def ask(tokenizer, given: str | None, max_new_tokens: int = 50) -> Response | Refusal:
    engine = GivenEngine(tokenizer)
    ids = tuple(chat.prompt_ids(tokenizer, ASKED))
    request = Request(request_key("a" * 16, 0), ids, ASKED, max_new_tokens, 0.0, 1.0, 0, response=given)
    (answer,) = engine.answer(ListFeed([request]))
    assert answer is not None
    return answer


def test_the_given_answer_is_the_answer_and_ends_with_the_stop_id(tokenizer) -> None:
    answer = ask(tokenizer, "Three of them")
    assert isinstance(answer, Response)
    assert (answer.text, answer.finish_reason) == ("Three of them", "stop")
    assert answer.token_ids[-1] == chat.end_of_turn_id(tokenizer)
    assert tokenizer.decode(answer.token_ids[:-1]) == "Three of them"


def test_a_long_answer_is_cut_and_says_so(tokenizer) -> None:
    answer = ask(tokenizer, "Three of them", max_new_tokens=2)
    assert isinstance(answer, Response)
    assert (len(answer.token_ids), answer.finish_reason) == (2, "length")


def test_without_an_answer_the_prompt_is_refused(tokenizer) -> None:
    refusal = ask(tokenizer, None)
    assert isinstance(refusal, Refusal) and "gives no answer" in refusal.reason
