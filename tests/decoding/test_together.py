"""Prompts in one batch are decoded as each alone: the same ids, rounds and random numbers, whatever the others do."""

import gc
import random
import weakref

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from dllm.config.params import Target
from dllm.decoding.sampling import samplings
from dllm.decoding.settings import SampledSettings
from dllm.decoding.speculative import Decoder
from dllm.decoding.together import can_batch, decode_together
from dllm.errors import DataError
from dllm.models import targets
from dllm.models.drafts.config import FULL, SLIDING
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.drafts.dflash2 import DFlash2Config, DFlash2Draft
from tests.decoding.stand_in_drafts import ScriptedDraft, config
from tests.decoding.test_speculative import random_draft


@pytest.fixture(scope="module")
def model():
    return targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")


def prompts(number: int, seed: int) -> list[list[int]]:
    draws = random.Random(seed)
    return [[draws.randrange(4, 900) for _ in range(draws.randint(1, 40))] for _ in range(number)]


def draft_of(model, name: str, texts: list[list[int]]):
    if name == "none":
        return None
    window = {"sliding_window": 5} if "window" in name else {}
    if name.startswith("dflash2"):
        sizes = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 4, "selector_top_k": 5}
        draft = DFlash2Draft(DFlash2Config(**vars(config(model, 4, **window, is_causal=False)), **sizes))
        draft.reset_parameters(seed=1, std=0.2)
        return draft
    if window:  # a causal layer with the window, and one that sees all
        mixed = config(model, 4, **window, layer_types=(SLIDING, FULL), num_hidden_layers=2)
        draft = DFlashDraft(mixed)
        draft.reset_parameters(seed=5, std=0.2)
        return draft
    return random_draft(model, 4) if name == "dflash" else Knowing(model, texts)


class Knowing(ScriptedDraft):
    """Proposes how one of some texts goes on after the anchor, wrong at every fifth position."""

    def __init__(self, model, texts: list[list[int]]) -> None:
        super().__init__(config(model, 4), lambda position: 0, model.config.max_position_embeddings)
        self.texts = texts

    def propose(self, anchor_id, num_tokens, features_BSF, start, cache, target, sampling=None):
        found = super().propose(anchor_id, num_tokens, features_BSF, start, cache, target)
        text = next((text for text in self.texts if text[start : start + 1] == [anchor_id]), [])
        ahead = [*text[start + 1 :], *[0] * num_tokens][:num_tokens]
        wrong = [token + (start + slot) % 5 // 4 for slot, token in enumerate(ahead)]
        found.ids_P.copy_(torch.tensor(wrong))
        return found


def alone(decoder: Decoder, asked: list[list[int]], **options) -> list:
    how = options.pop("samplings")
    return [decoder.generate(ids, sampling=each, **options) for ids, each in zip(asked, how, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("name", ["none", "dflash", "mixed windows", "dflash2", "dflash2 with a window", "knowing"])
@pytest.mark.parametrize(("size", "seed"), [(3, 2), (8, 3)])
def test_a_batch_gives_each_prompt_what_it_gets_alone(
    model, name: str, size: int, seed: int, temperature: float
) -> None:
    asked = [*prompts(6, seed), prompts(1, seed)[0]]  # one twice
    settings = SampledSettings(temperature=temperature, top_k=20 if temperature else 0, seed=seed)
    limits = {"max_new_tokens": 5 + 4 * seed, "stop_ids": set(range(0, 1408, 9))}
    plain = alone(Decoder(model), asked, samplings=samplings(asked, settings), **limits)
    texts = [[*ids, *answer.token_ids] for ids, answer in zip(asked, plain, strict=True)]
    decoder = Decoder(model, draft_of(model, name, texts))
    wanted = alone(decoder, asked, samplings=samplings(asked, settings), **limits)
    found = dict(decode_together(decoder, asked, batch_size=size, samplings=samplings(asked, settings), **limits))
    assert sorted(found) == list(range(len(asked)))
    for index, one in enumerate(wanted):
        assert found[index].token_ids == one.token_ids
        assert [r.counts for r in found[index].rounds] == [r.counts for r in one.rounds]
        assert found[index].stopped == one.stopped
        assert [r.chances for r in found[index].rounds] == [pytest.approx(r.chances, abs=1e-5) for r in one.rounds]
    if name == "knowing" and temperature == 0:
        assert len({r.counts.num_emitted for answer in wanted for r in answer.rounds}) > 2, "rows advance differently"
    if temperature == 0:
        assert [answer.token_ids for answer in wanted] == [answer.token_ids for answer in plain]
    else:
        assert found[0].token_ids != found[6].token_ids


def test_responses_come_as_they_end_and_the_last_positions_are_used(model) -> None:
    asked, limit = prompts(5, 4), 48
    small = targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")
    small.config.max_position_embeddings = limit
    decoder = Decoder(small, random_draft(small, 4))
    wanted = [decoder.generate(ids, max_new_tokens=limit) for ids in asked]
    found = list(decode_together(decoder, asked, batch_size=5, max_new_tokens=limit))
    assert [dict(found)[index].token_ids for index in range(5)] == [one.token_ids for one in wanted]
    assert all(len(ids) + len(dict(found)[index].token_ids) == limit for index, ids in enumerate(asked))
    by_length = sorted(range(5), key=lambda index: -len(asked[index]))
    assert [index for index, _ in found] == by_length, "the longest prompt has the shortest response"


def test_a_prompt_without_room_is_refused_before_any_is_decoded(model) -> None:
    with pytest.raises(DataError, match="0 tokens"):
        next(decode_together(Decoder(model), [[5], []], batch_size=2, max_new_tokens=3))


def test_a_target_with_a_sliding_window_is_decoded_one_by_one(model) -> None:
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    shape = MistralConfig(vocab_size=200, num_key_value_heads=2, sliding_window=6, **sizes)
    windowed = MistralForCausalLM(shape).eval()
    assert can_batch(model) and not can_batch(windowed)
    asked = [[1, 45, 33], [12, 77, 5, 20, 8, 9, 4, 3]]
    found = dict(decode_together(Decoder(windowed), asked, batch_size=2, max_new_tokens=9))
    assert [found[n].token_ids for n in (0, 1)] == [
        Decoder(windowed).generate(ids, max_new_tokens=9).token_ids for ids in asked
    ]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_finished_response_keeps_neither_cache_nor_features(model, batch_size, monkeypatch) -> None:
    draft = random_draft(model, 4)
    kept = []
    real = draft.new_cache

    def noted():
        kept.append(weakref.ref(made := real()))
        return made

    monkeypatch.setattr(draft, "new_cache", noted)
    found = decode_together(Decoder(model, draft), prompts(6, seed=2), max_new_tokens=6, batch_size=batch_size)
    done = 0
    for done, _ in enumerate(found, 1):
        gc.collect()
        if done == 5:
            break
    assert done == 5 and len(kept) == 6
    assert sum(each() is not None for each in kept) <= 1, "only the one that still decodes"
