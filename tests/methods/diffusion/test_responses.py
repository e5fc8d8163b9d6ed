"""What is counted of answers to held-out prompts, and on what terms two models are compared."""

import pytest

from dllm.config.load import parse_params
from dllm.errors import DataError
from dllm.methods.diffusion.evaluate import _digest, _from_each_source_in_turn, _prompts
from dllm.methods.diffusion.responses import Generated, figures
from dllm.methods.diffusion.settings import DiffusionEvaluation
from dllm.responses.shards import Row
from dllm.training.batches import make_examples

RAW = {
    "recipe": "x",
    "target": {"model": "builtin:tiny"},
    "prepare": {"sources": [{"name": "gsm8k"}]},
    "register": {"model_name": "x"},
    "evaluate": {"num_prompts": 2, "max_new_tokens": 8},
}


def row(id: str, source: str = "a", sample: int = 0, prompt: int = 3, answer: str = "1 2") -> Row:
    turns = [{"role": "user", "content": id}, {"role": "assistant", "content": answer}]
    ids = [30 + len(answer), 31, 32]
    return Row(id, sample, source, "heldout", turns, list(range(20, 20 + prompt)), ids, "stop", len(ids))


def test_answers_are_compared_whole_and_words_where_they_stand() -> None:
    answers = [
        Generated("1", "1 2 3\n", "1 2 3", 3, 2, 0.5, "3"),
        Generated("2", "1 9 3 4", "1 2 3", 4, 2, 0.5, "3"),
        Generated("3", "2", "1 2", 1, 1, 0.5),
    ]
    found = figures(answers, seen={"1", "3"})
    assert found["answers"] == 3 and found["answers_exact"] == 1 / 3
    assert found["answers_checked"] == 2 and found["answers_right"] == 1 / 2
    assert found["words"] == 8 and found["words_exact"] == 5 / 8
    assert found["words_unseen"] == 3 and found["words_unseen_exact"] == 1 / 3  # each answer's 2
    assert found["tokens_per_pass"] == 8 / 5
    assert figures(answers[2:], set())["answers_right"] is None


def test_sources_take_turns() -> None:
    rows = [row("1"), row("2"), row("3"), row("4", "b")]
    assert [r.prompt_id for r in _from_each_source_in_turn(rows)] == ["1", "4", "2", "3"]


def test_a_prompt_is_decoded_once_and_only_where_its_answer_has_room() -> None:
    asked = parse_params(RAW).evaluate
    rows = [row("1", sample=s) for s in range(4)] + [row("2", prompt=13), row("3"), row("4"), row("5", "b")]
    found, too_long = _prompts(rows, asked, max_length=20)
    assert [(r.prompt_id, r.sample) for r in found] == [("1", 0), ("3", 0), ("5", 0)] and too_long == 1
    assert [r.prompt_id for r in _prompts(rows, asked, max_length=21)[0]] == ["1", "2", "5"]
    with pytest.raises(
        DataError, match=r"none of 5 held-out prompts leaves room for 8 new tokens within the 10 of the model"
    ):
        _prompts(rows, asked, max_length=10)


@pytest.mark.parametrize("score", ["nelbo", "words", "answers"])
def test_terms_differ_where_scores_would(score: str) -> None:
    two = (row("1"), row("2"))

    def named(rows=two, known=None, **changes) -> str:
        raw = {**RAW, "target": {**RAW["target"], "dtype": changes.pop("dtype", "float32")}}
        raw["evaluate"] = {**RAW["evaluate"], **{k: changes.pop(k) for k in RAW["evaluate"].keys() & changes.keys()}}
        settings = DiffusionEvaluation.model_validate({"score": score, **changes})
        return _digest(parse_params(raw), settings, make_examples(rows, 100).kept, list(rows), known or {})

    same = named()
    assert named(batch_size=5, thresholds=[0.3]) == same, "no figure depends on them"
    assert named(dtype="bfloat16") != same
    assert named(rows=(row("1"), row("2", prompt=4))) != same
    assert named(rows=(row("1"), row("2", answer="1 2 3"))) != same
    assert (named(likelihood_samples=9) != same) == (score == "nelbo")
    assert (named(max_new_tokens=9) != same) == (score != "nelbo")
    assert (named(steps=[4]) != same) == (score != "nelbo")
    assert (named(known={"1": "7"}) != same) == (score != "nelbo")
