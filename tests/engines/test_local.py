"""The in-process engine against transformers' own generate, on the built-in tiny model."""

import pytest
import torch

from dllm.config.params import Target
from dllm.engines.engine import Request, RequestList
from dllm.engines.local import LocalEngine
from dllm.engines.next_token import nucleus, sample
from dllm.errors import ModelError
from dllm.models.targets import load_target


class Plain:
    """Turns ids into text and nothing else."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def model():
    return load_target(Target(model="builtin:tiny"), dtype="float32")


@pytest.fixture
def one_thread():
    torch.set_num_threads(1)


def request(key: int, length: int, new: int = 12, temperature: float = 0.0, top_p: float = 1.0) -> Request:
    ids = torch.randint(5, 200, (length,), generator=torch.Generator().manual_seed(key)).tolist()
    return Request(str(key), tuple(ids), [], new, temperature, top_p, key)


def answers(model, requests, batch_size=4, stop_ids=frozenset()):
    engine = LocalEngine(model, Plain(), set(stop_ids), batch_size)
    return {answer.key: answer for answer in engine.answer(RequestList(requests)) if answer is not None}


def generated(model, request):
    ids = torch.tensor([request.prompt_ids])
    out = model.generate(ids, max_new_tokens=request.max_new_tokens, do_sample=False, eos_token_id=None)
    return tuple(out[0, ids.shape[1] :].tolist())


def test_greedy_ids_are_those_of_generate_for_ragged_prompts_and_refilled_slots(model):
    requests = [request(key, length, new) for key, (length, new) in enumerate([(3, 9), (17, 4), (8, 12)] * 5)]
    got = answers(model, requests)
    assert {key: a.token_ids for key, a in got.items()} == {r.key: generated(model, r) for r in requests}
    assert all(a.finish_reason == "length" for a in got.values())


def test_a_stop_token_ends_a_row_and_is_kept(model):
    one = request(1, 9)
    whole = generated(model, one)
    stop = whole[4]
    answer = answers(model, [one], stop_ids={stop})["1"]
    assert answer.token_ids == whole[: whole.index(stop) + 1]
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_sampled_answer_does_not_depend_on_its_neighbours(model, top_p):
    requests = [request(key, 5 + key, temperature=0.9, top_p=top_p) for key in range(9)]
    crowd = answers(model, requests, batch_size=8)
    for one in requests[::4]:
        assert answers(model, [one])[one.key].token_ids == crowd[one.key].token_ids
    assert len({a.token_ids for a in crowd.values()}) == 9


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 products")
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_on_one_thread_in_bfloat16_an_answer_is_the_same_in_any_company(temperature, one_thread):
    model = load_target(Target(model="builtin:tiny"), dtype="bfloat16")
    requests = [request(key, 3 + 7 * (key % 13), 60, temperature, 0.9) for key in range(39)]
    crowd = answers(model, requests, batch_size=39)
    for company, slots in ((requests[::3], 2), (requests[5:9], 1), (requests[2:], 5)):
        for key, answer in answers(model, company, batch_size=slots).items():
            assert answer == crowd[key]


class Dialogue:
    """A feed that has a row's next turn only once its last has been answered."""

    def __init__(self, requests, turns):
        self.ready, self.left = list(requests), {r.key: (r, turns - 1) for r in requests}

    def take(self):
        return self.ready.pop() if self.ready else None

    def accept(self, answer):
        request, left = self.left[answer.key]
        if left:
            longer = Request(request.key, (*request.prompt_ids, *answer.token_ids), [], 12, 0.0, 1.0, 0)
            self.left[answer.key] = (longer, left - 1)
            self.ready.append(longer)


def test_requests_that_come_up_with_the_answers_are_answered_too(model):
    feed = Dialogue([request(key, 5 + key) for key in range(6)], turns=3)
    counts = {}
    for answer in LocalEngine(model, Plain(), set(), 4).answer(feed):
        if answer is not None:
            counts[answer.key] = counts.get(answer.key, 0) + 1
            feed.accept(answer)
    assert counts == {str(key): 3 for key in range(6)}


def test_no_request_no_answer(model):
    assert answers(model, []) == {}


def test_sampling_follows_the_tempered_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    row = request(0, 1, temperature=0.7)
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([sample(logits, [row], [generator])[0] for _ in range(4000)])
    want = torch.softmax(logits[0] / 0.7, 0)
    assert (draws.bincount(minlength=4) / 4000 - want).abs().max() < 0.03


def test_the_nucleus_leaves_the_tail_out():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    row = request(0, 1, temperature=1.0, top_p=0.7)
    generator = torch.Generator().manual_seed(0)
    assert {sample(logits, [row], [generator])[0] for _ in range(300)} == {0, 1}


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 0.999999])
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0], ids=["flat", "broad", "peaked"])
def test_the_nucleus_is_the_beginning_of_the_sorted_vocabulary(scale, top_p):
    logits = scale * torch.randn(3000, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # with ties
    probs, ids = torch.softmax(logits, 0).sort(descending=True, stable=True)
    inside = probs.cumsum(0) - probs < top_p
    found_probs, found_ids = nucleus(torch.softmax(logits, 0), top_p)
    assert found_probs.equal(probs[inside]) and found_ids.equal(ids[inside])


def test_a_draw_on_the_last_sum_takes_the_last_token_that_has_a_probability(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.tensor(1.0))
    logits = torch.tensor([[2.0, float("-inf"), 1.0, float("-inf")]])
    assert sample(logits, [request(0, 1, temperature=1.0)], [torch.Generator()]) == [2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_end_generation_unless_their_slot_is_free(temperature):
    logits = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    rows, generators = [request(key, 1, temperature=temperature) for key in range(2)], [torch.Generator()] * 2
    assert len(sample(logits, [None, rows[1]], generators)) == 2
    with pytest.raises(ModelError, match="not numbers"):
        sample(logits, rows, generators)
