"""The engine that takes responses from the dataset."""

import pytest

from dllm.config.params import Target
from dllm.config.regenerate import Regenerate
from dllm.engines.dataset import DatasetEngine
from dllm.engines.engine import Refusal, Request, RequestList, Response, request_key
from dllm.errors import ConfigError
from dllm.models import targets
from dllm.prompts import template as chat

ASKED = [{"role": "user", "content": "How many?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return targets.load_tokenizer(Target(model="builtin:tiny"))


def ask(tokenizer, response: str | None, max_new_tokens: int = 50) -> Response | Refusal:
    engine = DatasetEngine(tokenizer)
    ids = tuple(chat.prompt_ids(tokenizer, ASKED))
    request = Request(request_key("a" * 16, 0), ids, ASKED, max_new_tokens, 0.0, 1.0, 0, response=response)
    (answer,) = engine.answer(RequestList([request]))
    assert answer is not None
    return answer


def test_the_dataset_s_response_is_the_response_and_ends_with_the_stop_id(tokenizer) -> None:
    answer = ask(tokenizer, "Three of them")
    assert isinstance(answer, Response)
    assert (answer.text, answer.finish_reason) == ("Three of them", "stop")
    assert answer.token_ids[-1] == chat.end_of_turn_id(tokenizer)
    assert tokenizer.decode(answer.token_ids[:-1]) == "Three of them"


def test_a_long_response_is_cut_and_says_so(tokenizer) -> None:
    answer = ask(tokenizer, "Three of them", max_new_tokens=2)
    assert isinstance(answer, Response)
    assert (len(answer.token_ids), answer.finish_reason) == (2, "length")


def test_without_a_response_the_request_is_refused(tokenizer) -> None:
    refusal = ask(tokenizer, None)
    assert isinstance(refusal, Refusal) and "the dataset has no response" in refusal.reason


def test_it_takes_the_last_response_of_a_chat_only() -> None:
    DatasetEngine.check(Regenerate(engine="dataset", turns="last"))
    with pytest.raises(ConfigError, match=r"last response.*regenerate\.turns: all.*set it to last"):
        DatasetEngine.check(Regenerate(engine="dataset"))
