"""Causal models: the same results as by lm-evaluation-harness's own class."""

import pytest

from dllm.config.params import Target
from dllm.lm_eval.adapter import HarnessModel
from dllm.lm_eval.models import CausalScores, DiffusionScores
from dllm.models.diffusion.transformers_lm import TransformersLM
from dllm.models.targets import load_target, load_tokenizer
from tests.lm_eval.local_tasks import HYBRID, request

TINY = Target(model="builtin:tiny", dtype="float32")
TEXT = "How many hours does it take to read a long page of another book by hand?\n\nOne, or two."
PAIRS = [("How many hours", " does it take?"), ("", "Water"), ("How many ", "hours"), (TEXT, " Or three.")]


@pytest.fixture(scope="module")
def both():
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_target(TINY, device="cpu"), load_tokenizer(TINY)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=20, batch_size=2)
    return HarnessModel(CausalScores(model, tokenizer, batch_size=3), max_length=20), theirs


def test_scores_are_the_same(both) -> None:
    ours, theirs = both
    requests = [request(*pair) for pair in PAIRS]
    found, wanted = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in wanted], rel=1e-4)
    assert [same for _, same in found] == [same for _, same in wanted]


def test_long_texts_are_cut_into_the_same_windows(both) -> None:
    ours, theirs = both
    requests = [request(TEXT), request("How?"), request(TEXT + TEXT)]
    wanted = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(wanted, rel=1e-4)


def test_greedy_answers_are_the_same(both) -> None:
    ours, theirs = both
    ways = [{"max_gen_toks": 8, "until": ["\n\n"]}, {"max_gen_toks": 9, "until": ["e", "a"], "do_sample": False}]
    requests = [request(context, dict(way)) for way in ways for context in ("How many hours", TEXT)]
    wanted = theirs.generate_until([request(context, dict(way)) for context, way in (r.args for r in requests)], True)
    assert ours.generate_until(requests) == wanted


def test_a_hybrid_model_is_scored_by_its_causal_side(both) -> None:
    ours, _ = both
    tokenizer = load_tokenizer(TINY)
    model = TransformersLM(load_target(TINY, device="cpu"), tokenizer, 500)
    model.config = HYBRID
    hybrid = HarnessModel(DiffusionScores(model, batch_size=3), max_length=20)
    requests = [request(*pair) for pair in PAIRS]
    found, wanted = hybrid.loglikelihood(requests), ours.loglikelihood(requests)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in wanted], rel=1e-4)
    assert hybrid.loglikelihood_rolling([request(TEXT)]) == pytest.approx(ours.loglikelihood_rolling([request(TEXT)]))
