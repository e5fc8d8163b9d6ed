"""The three requests of the harness, on models whose results are known."""

import math
from collections.abc import Callable

import pytest
import torch

from dllm.errors import ConfigError, DataError
from dllm.lm_eval import texts
from dllm.lm_eval.adapter import HarnessModel
from dllm.lm_eval.models import CausalScores, DiffusionScores
from dllm.models.diffusion.protocol import DiffusionLM
from tests.lm_eval.local_tasks import BLOCKS, HYBRID, VOCABULARY, of_one_word, request, whole_model

CONFIGS = [None, BLOCKS, HYBRID]
IDS = ["full", "blocks", "hybrid"]
TEXT = "How many hours does it take to read a long page of another book by hand?"
FIVE = ["one water", " two", " many words that were found there", " a page of letters for them all to read at home", ""]


def asked(model: DiffusionLM, batch_size: int = 4, max_length: int | None = None, **options) -> HarnessModel:
    scores = DiffusionScores(model, batch_size=batch_size, **{"samples": 8, **options})
    return HarnessModel(scores, batch_size=batch_size, max_length=max_length)


def plain(model: DiffusionLM) -> HarnessModel:
    model.model_config.is_causal = True
    return HarnessModel(CausalScores(model.model, model.tokenizer))


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("max_length", [None, 9])
def test_a_uniform_model_gives_every_token_the_same(config, max_length) -> None:
    model = of_one_word({}, config)
    tokens = len(texts.encode(model.tokenizer, TEXT))
    assert tokens > 2 * 9
    found = asked(model, max_length=max_length).loglikelihood_rolling([request(TEXT), request(""), request("hours")])
    assert found[0] == pytest.approx(-tokens * math.log(VOCABULARY), rel=1e-5)
    assert found[1] == 0


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_known_probabilities_add_up_exactly_where_all_masks_are_enumerated(config) -> None:
    model = of_one_word({" water": 6.0, " where": 4.0}, config)
    adapter = asked(model, samples=7)  # three tokens have seven masks
    total = math.log(VOCABULARY - 2 + math.exp(6) + math.exp(4))
    pairs = [("How?", " water where hours"), ("How?", " where"), ("", " water"), ("How?", "")]
    found = adapter.loglikelihood([request(*pair) for pair in pairs])
    wanted = [10 - 3 * total, 4 - total, 6 - total, 0]
    assert [value for value, _ in found] == pytest.approx(wanted, abs=1e-4)
    assert adapter.errors == [0, 0, 0]
    assert adapter.report()["kind"] == {None: "bound", BLOCKS: "block bound", HYBRID: "exact"}[config]


def test_more_masks_than_samples_leave_an_error_that_is_reported() -> None:
    adapter = asked(of_one_word({" water": 6.0}), samples=6)
    adapter.loglikelihood([request("How?", " water where hours"), request("How?", " where")])
    report = adapter.report()
    assert report["scored"] == 2 and report["all_masks_taken"] == 0.5 and report["samples"] == 6
    assert report["mean_error"] == pytest.approx(sum(adapter.errors) / 2) and report["mean_error"] > 0


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_results_depend_on_neither_batch_size_nor_order(config) -> None:
    model = whole_model(config=config)
    requests = [request("How many", text, doc={"number": n // 2}) for n, text in enumerate(FIVE)]
    rolling = [request(TEXT), request("Why?"), request(TEXT[20:])]
    few, many = asked(model, batch_size=1).loglikelihood(requests), asked(model, batch_size=5)
    assert [x for x, _ in few] == pytest.approx([x for x, _ in many.loglikelihood(requests[::-1])[::-1]], rel=1e-4)
    alone = asked(model, batch_size=1, max_length=12).loglikelihood_rolling(rolling)
    together = asked(model, batch_size=5, max_length=12).loglikelihood_rolling(rolling[::-1])
    assert alone == pytest.approx(together[::-1], rel=1e-4)


def test_choices_of_one_document_share_masks_where_they_are_as_long() -> None:
    """Two texts whose tokens have the same probabilities position by position differ in nothing but their masks."""
    adapter = asked(of_one_word({" water": 5.0}), samples=4)
    ends = [" water where hours take help days", " water take hours help where only"]
    pairs = [(end, number) for number in range(6) for end in ends]
    found = [x for x, _ in adapter.loglikelihood([request("How?", end, doc={"number": n}) for end, n in pairs])]
    assert min(adapter.errors) > 0
    assert found[::2] == pytest.approx(found[1::2], abs=1e-5)
    assert max(found) - min(found) > 1


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_greedy_continuations_are_checked_on_demand(config) -> None:
    model = of_one_word({" water": 3.0}, config)
    requests = [request("How?", text) for text in (" water water", " water", " water where")]
    assert [same for _, same in asked(model, check_greedy=True).loglikelihood(requests)] == [True, True, False]
    free = [same for _, same in asked(model).loglikelihood(requests)]
    assert free == ([True, True, False] if config is HYBRID else [False] * 3)


def test_a_long_context_loses_its_beginning() -> None:
    model = whole_model()
    whole = texts.encode(model.tokenizer, TEXT)
    end = model.tokenizer.decode(whole[-8:])
    assert texts.encode(model.tokenizer, end) == whole[-8:]
    document = {"number": 1}
    found = asked(model, max_length=10).loglikelihood(
        [request(TEXT, " water word", doc=document), request(end, " water word", doc=document)]
    )
    assert found[0] == pytest.approx(found[1])
    with pytest.raises(DataError, match="a continuation of 10 tokens; the model takes 10"):
        asked(model, max_length=10).loglikelihood([request("How?", " water" * 10)])


def test_text_that_holds_the_mask_is_refused_where_masks_have_a_meaning() -> None:
    model = whole_model()
    token = model.tokenizer.convert_ids_to_tokens(model.mask_token_id)
    word = model.tokenizer.convert_tokens_to_string([token])
    assert model.mask_token_id in texts.encode(model.tokenizer, word)
    with pytest.raises(DataError, match="holds the mask token"):
        asked(model).loglikelihood([request(word, " water")])


MAKERS: list[Callable[..., HarnessModel]] = [asked, plain]


@pytest.mark.parametrize("make", MAKERS)
def test_responses_stop_at_the_stop_strings_of_the_task(make) -> None:
    adapter = make(of_one_word({" water": 30.0}))
    ways = [
        {"max_gen_toks": 3},
        {"max_gen_toks": 5, "until": ["x", "er", "at"]},
        {"max_gen_toks": 5, "until": " water"},
        {"max_tokens": 1, "do_sample": True, "temperature": 0.5},
    ]
    found = adapter.generate_until([request(context, dict(way)) for way in ways for context in ("How?", "")])
    assert found == [text for text in (" water water water", " w", "", " water") for _ in range(2)]


@pytest.mark.parametrize("make", MAKERS)
def test_samples_differ_by_repetition_and_seed_and_by_nothing_else(make) -> None:
    model = whole_model(scale=0.1)
    model.eos_ids = set()
    way = {"max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    first, second, again = make(model).generate_until([request(p, way) for p in ("How?", "Why not?", "How?")])
    assert first != again
    adapter = make(model)
    adapter.batch_size = 1
    assert adapter.generate_until([request(p, way) for p in ("Why not?", "How?", "How?")]) == [second, first, again]
    assert make(model).generate_until([request("How?", {**way, "seed": 1})]) != [first]
    assert make(model).generate_until([request("How?", {**way, "seed": 0})]) == [first]


def test_settings_of_the_sampler_come_with_the_task_and_bad_ones_are_refused() -> None:
    model = whole_model()
    model.eos_ids = set()
    adapter = asked(model)
    plain_text = adapter.generate_until([request("How?", {"max_gen_toks": 8})])
    assert adapter.generate_until([request("How?", {"max_gen_toks": 8, "steps": 1, "block_size": 8})]) != plain_text
    with pytest.raises(ConfigError, match="sampler takes no num_beams"):
        adapter.generate_until([request("How?", {"num_beams": 3})])
    with pytest.raises(ConfigError, match="sampler takes no steps"):
        plain(model).generate_until([request("How?", {"steps": 3})])
    with pytest.raises(DataError, match="leaves no room for its prompt"):
        asked(model, max_length=8).generate_until([request("How?", {"max_gen_toks": 8})])
    with pytest.raises(ConfigError, match="sampler ar needs a model that also learned causal prediction"):
        asked(model, sampler="ar")


def test_a_prompt_that_is_too_long_loses_its_beginning() -> None:
    model = whole_model()
    model.eos_ids = set()
    whole = texts.encode(model.tokenizer, TEXT)
    end = model.tokenizer.decode(whole[-6:])
    way = {"max_gen_toks": 4}
    long, short = asked(model, max_length=10).generate_until([request(TEXT, way), request(end, way)])
    assert long == short


def test_chats_are_rendered_by_the_models_template() -> None:
    adapter = asked(whole_model())
    chat = [{"role": "user", "content": "How?"}]
    assert adapter.apply_chat_template(chat) == "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    begun = [*chat, {"role": "assistant", "content": "By"}]
    assert adapter.apply_chat_template(begun, add_generation_prompt=False).endswith("assistant\nBy")
    assert adapter.chat_template(False) == "" and "im_start" in adapter.chat_template(True)
    named = adapter.tokenizer_name
    assert "/" not in named
    adapter.tokenizer.chat_template = "{{ messages[0].content }}"
    assert adapter.tokenizer_name != named
    adapter.tokenizer.chat_template = None
    with pytest.raises(DataError, match="the chat template fails"):
        adapter.apply_chat_template(chat)


def test_it_takes_its_rank_from_the_process_group() -> None:
    from dllm.training.distributed import Ranks

    scores = DiffusionScores(whole_model())
    adapter = HarnessModel(scores, ranks=Ranks(1, 4, torch.device("cpu")))
    assert (adapter.rank, adapter.world_size) == (1, 4)
    alone = HarnessModel(scores)
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.all_gather(torch.tensor(3)).tolist() == [3]
    assert alone.gather_object({"a": (1, 2)}) == [{"a": (1, 2)}]
