"""Greedy speculative decoding generates what the target alone generates, whatever the draft (conformance 1 to 11)."""

import itertools
import math

import pytest
import torch

from dllm.config.params import Target
from dllm.decoding.acceptance import RoundCounts
from dllm.decoding.speculative import Decoder, Decoding, Generation, Round
from dllm.errors import DataError, ModelError
from dllm.models import targets
from dllm.models.drafts.dflash import DFlashDraft
from tests.decoding.stand_in_drafts import config, oracle

PROMPT = [1, 300, 20, 45, 301, 77, 5, 810, 33, 640, 12]
LONGEST = 40


@pytest.fixture(scope="module")
def model():
    return targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")


@pytest.fixture(scope="module")
def truth(model) -> list[int]:
    """Greedy decoding without a cache: the whole sequence again for every token."""
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(LONGEST + 16):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def random_draft(model, block_size: int, layers: int = 1) -> DFlashDraft:
    draft = DFlashDraft(config(model, block_size))
    draft.reset_parameters(seed=5, std=0.2)
    return draft


def speculate(model, draft, limit: int, block_size: int = 0, **options) -> Generation:
    return Decoder(model, draft, block_size).generate(PROMPT, max_new_tokens=limit, **options)


def emitted(answer: Generation) -> list[int]:
    return [r.counts.num_emitted for r in answer.rounds]


def test_the_text_wanders_so_that_a_shift_by_one_shows(truth: list[int]) -> None:
    assert len(set(truth)) > len(truth) // 2
    assert all(a != b for a, b in itertools.pairwise(truth))


@pytest.mark.parametrize("limit", [1, 2, 7, LONGEST])
def test_one_token_at_a_time_is_greedy(model, truth: list[int], limit: int) -> None:
    answer = Decoder(model).generate(PROMPT, max_new_tokens=limit)
    assert answer.token_ids == truth[:limit]
    assert emitted(answer) == [1] * (limit - 1)
    assert not answer.stopped


@pytest.mark.parametrize(("block", "limit"), list(itertools.product([2, 3, 8], [1, 2, 7, LONGEST])))
@pytest.mark.parametrize("kind", ["random", "oracle", "adversary", "every third wrong"])
def test_any_draft_gives_the_greedy_ids(model, truth: list[int], kind: str, block: int, limit: int) -> None:
    wrong = {"oracle": lambda p: False, "adversary": lambda p: True, "every third wrong": lambda p: p % 3 == 0}
    draft = random_draft(model, block) if kind == "random" else oracle(model, PROMPT, truth, block, wrong[kind])
    answer = speculate(model, draft, limit)
    assert answer.token_ids == truth[:limit]
    assert all(1 <= number <= block for number in emitted(answer))
    assert len(answer.token_ids) == min(limit, 1 + sum(emitted(answer)))
    assert 1 + sum(emitted(answer)[:-1]) < limit or limit == 1, "no round after the last token"


@pytest.mark.parametrize("block", [2, 5, 8])
def test_an_oracle_fills_every_round(model, truth: list[int], block: int) -> None:
    answer = speculate(model, oracle(model, PROMPT, truth, block), LONGEST)
    assert emitted(answer) == [block] * math.ceil((LONGEST - 1) / block)


def test_an_adversary_gains_nothing(model, truth: list[int]) -> None:
    draft = oracle(model, PROMPT, truth, 4, wrong=lambda position: True)
    assert emitted(speculate(model, draft, LONGEST)) == [1] * (LONGEST - 1)


def test_acceptance_is_the_leading_run(model, truth: list[int]) -> None:
    # Anchors stand at n, n + 3, n + 6 ...: two slots after each are right, the third is wrong, the fourth right again.
    first = len(PROMPT)
    draft = oracle(model, PROMPT, truth, 5, wrong=lambda position: (position - first) % 3 == 0)
    answer = speculate(model, draft, 13)
    assert emitted(answer) == [3, 3, 3, 3]
    assert [r.counts.num_accepted for r in answer.rounds] == [2, 2, 2, 2]
    assert [r.counts.num_drafted for r in answer.rounds] == [4, 4, 4, 4]


def test_a_smaller_block_than_the_drafts(model, truth: list[int]) -> None:
    draft = oracle(model, PROMPT, truth, 8)
    answer = speculate(model, draft, 13, block_size=3)
    assert answer.token_ids == truth[:13] and emitted(answer) == [3] * 4
    assert {num_tokens for _, num_tokens, _, _ in draft.calls} == {2}


@pytest.mark.parametrize("block_size", [1, 9])
def test_blocks_that_a_draft_cannot_do_are_refused(model, truth: list[int], block_size: int) -> None:
    with pytest.raises(ModelError, match=f"block size {block_size}.*trained on blocks of 8.*from 2 to 8"):
        Decoder(model, oracle(model, PROMPT, truth, 8), block_size)


def test_caches_hold_what_stands_before_the_newest_token(model, truth: list[int]) -> None:
    draft = oracle(model, PROMPT, truth, 6, wrong=lambda position: position % 4 == 0)
    decoding = Decoding(Decoder(model, draft), PROMPT, LONGEST, ())
    committed, seen = len(PROMPT), set()
    for each in decoding.rounds():
        seen.add(each.counts.num_emitted)
        committed += 0 if each.is_prefill else each.counts.num_emitted
        assert decoding.start == committed
        assert decoding.cache.get_seq_length() == committed
        assert decoding.features_BSF is not None
        assert decoding.features_BSF.shape[1] == (len(PROMPT) if each.is_prefill else each.counts.num_emitted)
        assert decoding.newest == truth[committed - len(PROMPT)]
    assert seen == {1, 4}, "nothing accepted, something accepted"


def test_features_are_the_outputs_of_the_tapped_layers(model, truth: list[int]) -> None:
    draft = oracle(model, PROMPT, truth, 4, wrong=lambda position: position % 5 == 0)
    answer = speculate(model, draft, 20)
    fed_SF = torch.cat([features_BSF[0] for _, _, features_BSF, _ in draft.calls])
    ids = torch.tensor([[*PROMPT, *answer.token_ids][: len(fed_SF)]])
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True).hidden_states
    layer_ids = draft.config.target_layer_ids
    torch.testing.assert_close(fed_SF, torch.cat([states[i + 1][0] for i in layer_ids], -1), rtol=1e-4, atol=1e-4)
    shifted_SF = torch.cat([states[i][0] for i in layer_ids], -1)
    assert (fed_SF - shifted_SF).abs().mean() > 0.05


def block_embeds(model, draft: DFlashDraft, anchor: int, number: int) -> torch.Tensor:
    return model.get_input_embeddings()(torch.tensor([[anchor] + [draft.config.mask_token_id] * number]))


def test_a_proposal_is_the_heads_argmax_at_the_masks(model, truth: list[int]) -> None:
    scripted = oracle(model, PROMPT, truth, 4)
    generated = speculate(model, scripted, 20)
    newest = [*PROMPT, *generated.token_ids]
    draft, target = random_draft(model, 4), Decoder(model).target
    one, other = draft.new_cache(), draft.new_cache()
    for anchor, number, features_BSF, start in scripted.calls:
        assert anchor == newest[start], "the anchor is the newest token"
        with torch.inference_mode():
            found = draft.propose(anchor, number, features_BSF, start, one, target)
            hidden_BLD = draft.run_block(block_embeds(model, draft, anchor, number), features_BSF, start, other)
        assert found.probs_PV is None
        assert found.ids_P.tolist() == target.head(hidden_BLD)[0, 1:].argmax(-1).tolist()


def test_context_added_round_by_round_is_the_context_at_once(model, truth: list[int]) -> None:
    scripted = oracle(model, PROMPT, truth, 4, wrong=lambda position: position % 3 == 0)
    speculate(model, scripted, 20)
    draft = random_draft(model, 4)
    cache = draft.new_cache()
    with torch.inference_mode():
        embeds = [block_embeds(model, draft, anchor, number) for anchor, number, _, _ in scripted.calls]
        step_by_step = [
            draft.run_block(embeds_BLD, features_BSF, start, cache)
            for embeds_BLD, (_, _, features_BSF, start) in zip(embeds, scripted.calls, strict=True)
        ]
        start = scripted.calls[-1][-1]
        all_BSF = torch.cat([features_BSF for _, _, features_BSF, _ in scripted.calls], 1)
        at_once = draft.run_block(embeds[-1], all_BSF, start, draft.new_cache())
    assert len(step_by_step) > 5 and cache.length == start
    torch.testing.assert_close(step_by_step[-1], at_once, rtol=1e-5, atol=1e-5)


def stop_at(truth: list[int], index: int) -> int:
    """Take an id that comes up at `index` for the first time."""
    assert truth[index] not in truth[:index]
    return truth[index]


@pytest.mark.parametrize("index", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("block", [0, 5])
def test_nothing_follows_the_first_stop_id(model, truth: list[int], index: int, block: int) -> None:
    # With an oracle and blocks of 5, index 0 is the prompt's token, 1 to 4 lie inside the drafts and 5 is the bonus.
    draft = oracle(model, PROMPT, truth, block) if block else None
    stops = {stop_at(truth, index), stop_at(truth, index + 2)}
    answer = Decoder(model, draft).generate(PROMPT, max_new_tokens=LONGEST, stop_ids=stops)
    assert answer.token_ids == truth[: index + 1]
    assert answer.stopped
    assert sum(emitted(answer)) == index
    assert len(answer.rounds) == math.ceil(index / (block or 1))


def test_a_round_that_a_stop_id_ends_counts_up_to_it(model, truth: list[int]) -> None:
    answer = speculate(model, oracle(model, PROMPT, truth, 5), LONGEST, stop_ids={truth[3]})
    assert [(r.tokens, r.counts) for r in answer.rounds] == [(tuple(truth[1:4]), (3, 3, 4))]
    answer = speculate(model, oracle(model, PROMPT, truth, 5), LONGEST, stop_ids={truth[5]})
    assert [(r.tokens, r.counts) for r in answer.rounds] == [(tuple(truth[1:6]), (5, 4, 4))]


def test_the_limit_cuts_the_response_but_not_the_count(model, truth: list[int]) -> None:
    answer = speculate(model, oracle(model, PROMPT, truth, 8), 4)
    assert answer.token_ids == truth[:4]
    assert [(r.tokens, r.counts.num_emitted) for r in answer.rounds] == [(tuple(truth[1:4]), 8)]


def test_the_mask_id_may_be_a_response(model, truth: list[int]) -> None:
    draft = oracle(model, PROMPT, truth, 4, mask=truth[5])
    answer = speculate(model, draft, 12)
    assert answer.token_ids == truth[:12] and truth[5] in answer.token_ids
    assert emitted(answer) == [4, 4, 4]


@pytest.mark.parametrize("with_draft", [False, True])
def test_no_position_past_the_targets_last_is_used(truth: list[int], with_draft: bool) -> None:
    model = targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")
    model.config.max_position_embeddings = limit = len(PROMPT) + 10
    reached = []

    def note(_, args, kwargs) -> None:
        reached.append(kwargs["past_key_values"].get_seq_length() + kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    draft = oracle(model, PROMPT, truth, 4) if with_draft else None
    answer = Decoder(model, draft).generate(PROMPT, max_new_tokens=LONGEST)
    assert answer.token_ids == truth[:10]
    assert max(reached) <= limit
    with pytest.raises(DataError, match=rf"{limit} tokens leaves no room.*the target has {limit} positions"):
        Decoder(model, draft).generate([5] * limit, max_new_tokens=1)


def test_the_last_blocks_shrink_to_the_positions_left(truth: list[int]) -> None:
    model = targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")
    model.config.max_position_embeddings = len(PROMPT) + 7
    draft = oracle(model, PROMPT, truth, 4, wrong=lambda position: position - len(PROMPT) in (5, 6))
    answer = Decoder(model, draft).generate(PROMPT, max_new_tokens=LONGEST)
    assert answer.token_ids == truth[:7]
    assert [r.counts for r in answer.rounds] == [(4, 3, 3), (1, 0, 2), (1, 0, 1)]


def test_an_empty_prompt_is_refused(model) -> None:
    with pytest.raises(DataError, match="0 tokens"):
        Decoder(model).generate([], max_new_tokens=4)


def test_greedy_decoding_repeats_and_draws_no_random_number(model, truth: list[int]) -> None:
    decoder = Decoder(model, random_draft(model, 4))
    before = torch.get_rng_state()
    one, two = (decoder.generate(PROMPT, max_new_tokens=12) for _ in range(2))
    assert (one.token_ids, emitted(one)) == (two.token_ids, emitted(two))
    assert torch.equal(before, torch.get_rng_state())


def test_rounds_come_one_by_one_and_leave_the_model_as_it_was(model, truth: list[int]) -> None:
    layers = model.get_decoder().layers
    hooks = [len(layer._forward_hooks) for layer in layers]
    stream = Decoder(model, oracle(model, PROMPT, truth, 4)).decode(PROMPT, max_new_tokens=LONGEST)
    prompt, first = next(stream), next(stream)
    assert prompt == Round((truth[0],), RoundCounts(1, 0, 0), prompt.seconds, is_prefill=True)
    assert first.tokens == tuple(truth[1:5])
    assert not torch.is_inference_mode_enabled()
    assert [len(layer._forward_hooks) for layer in layers] == hooks
    assert prompt.seconds > 0 and first.seconds > 0


def test_a_draft_of_another_dtype_is_copied_not_changed(model) -> None:
    draft = random_draft(model, 4).to(torch.bfloat16)
    decoder = Decoder(model, draft)
    assert next(draft.parameters()).dtype == torch.bfloat16
    assert decoder.draft is not None and next(decoder.draft.parameters()).dtype == torch.float32


def test_a_mask_id_outside_the_embedding_is_refused(model, truth: list[int]) -> None:
    with pytest.raises(ModelError, match="mask id 5000 is outside the target's embedding of 1408 rows"):
        Decoder(model, DFlashDraft(config(model, 4, mask_token_id=5000)))


def test_a_target_with_a_sliding_window_takes_tokens_back() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4)
    shape = MistralConfig(vocab_size=200, num_key_value_heads=2, sliding_window=6, initializer_range=0.3, **sizes)
    model = MistralForCausalLM(shape).eval()
    prompt = [1, 45, 33, 12, 77, 5, 20, 8, 9]
    plain = Decoder(model).generate(prompt, max_new_tokens=24).token_ids
    draft = oracle(model, prompt, [*plain, 0, 0, 0], 4, wrong=lambda position: position % 3 == 0)
    answer = Decoder(model, draft).generate(prompt, max_new_tokens=24)
    assert len(set(plain)) > 8
    assert answer.token_ids == plain
    assert max(emitted(answer)) > 1
