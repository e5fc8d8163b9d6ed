"""Unmasking by blocks: its laws, its batches, its caches."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import fill, sample
from dllm.errors import ConfigError, DataError
from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.protocol import DiffusionLM
from tests.models.small_models import FAMILIES, MASK, small_model

PROMPTS = [[21, 22, 23, 24, 25], [40, 41], [60, 61, 62, 63, 64, 65, 66, 67, 68], [80]]
BLOCKY, CAUSAL = DiffusionConfig("mdlm", MASK, 4), DiffusionConfig("hybrid", MASK, 4)
PLAIN = Settings(max_new_tokens=12, block_size=4)


@pytest.fixture(scope="module")
def model() -> DiffusionLM:
    return small_model()


def ids(answers) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def endless(model: DiffusionLM) -> DiffusionLM:
    model.eos_ids = set()
    return model


@pytest.mark.parametrize("context", ["full", "block", "causal"])
@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"steps": 5},
        {"steps": 100},
        {"block_size": None},
        {"threshold": 0.1},
        {"threshold": 0.1, "steps": 6},
        {"factor": 1.5},
        {"remasking": "entropy"},
        {"remasking": "margin"},
        {"remasking": "random"},
        {"temperature": 0.8, "top_p": 0.9},
        {"cfg_scale": 1.5},
        {"max_new_tokens": 10},
    ],
    ids=str,
)
def test_a_ragged_batch_equals_single_runs_and_leaves_no_mask(wish, context) -> None:
    model = endless(small_model(config={"full": None, "block": BLOCKY, "causal": CAUSAL}[context]))
    settings = dataclasses.replace(PLAIN, **wish)
    together = sample(model, PROMPTS, settings)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        (alone,) = sample(model, [prompt], settings)
        assert alone == answer
        assert len(answer.token_ids) == settings.max_new_tokens
        assert MASK not in answer.token_ids
        written = [place for step in answer.steps for place, _ in step]
        assert sorted(written) == list(range(settings.max_new_tokens))  # each once: nothing is revised
        assert answer.token_ids == [token for _, token in sorted(pair for step in answer.steps for pair in step)]
        assert all(answer.steps)
        assert answer.passes == len(answer.steps) * (2 if settings.cfg_scale else 1)


@pytest.mark.parametrize(("family", "window"), FAMILIES)
def test_every_family_decodes_ragged_batches(family: str, window: int | None) -> None:
    model = endless(small_model(family, window))
    together = ids(sample(model, PROMPTS, PLAIN))
    assert together == [ids(sample(model, [prompt], PLAIN))[0] for prompt in PROMPTS]


def test_permuted_prompts_get_permuted_responses(model) -> None:
    hot = dataclasses.replace(PLAIN, temperature=1.0)
    assert ids(sample(model, PROMPTS[::-1], hot)) == ids(sample(model, PROMPTS, hot))[::-1]


def test_steps_are_passes_and_blocks_go_from_left_to_right() -> None:
    (answer,) = sample(endless(small_model()), PROMPTS[:1], dataclasses.replace(PLAIN, steps=6))
    assert [len(step) for step in answer.steps] == [2] * 6
    assert [max(place for place, _ in step) // 4 for step in answer.steps] == [0, 0, 1, 1, 2, 2]


def test_blocks_of_one_under_causal_attention_are_greedy_decoding() -> None:
    model = endless(small_model(config=DiffusionConfig("hybrid", MASK, 1)))
    (answer,) = sample(model, PROMPTS[:1], dataclasses.replace(PLAIN, block_size=1))
    text = list(PROMPTS[0])
    for token in answer.token_ids:
        hidden = model.hidden(
            torch.tensor([[*text, MASK]]), allowed_BSS=torch.ones(1, len(text) + 1, len(text) + 1).tril().bool()
        )
        logits = model.logits(hidden[:, -1])
        logits[:, MASK] = -torch.inf
        assert int(logits.argmax()) == token
        text.append(token)


def test_a_negative_threshold_takes_a_block_per_pass_and_1_a_token() -> None:
    model = endless(small_model(scale=2.0))
    (fast,) = sample(model, PROMPTS[:1], dataclasses.replace(PLAIN, threshold=0.0))
    (slow,) = sample(model, PROMPTS[:1], dataclasses.replace(PLAIN, threshold=1.0))
    assert fast.passes == 3
    assert slow.passes == 12
    assert slow.token_ids == sample(model, PROMPTS[:1], PLAIN)[0].token_ids


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("wish", [{"threshold": 0.0}, {"steps": 3}, {"steps": 3, "cfg_scale": 0.7}], ids=str)
def test_stale_caches_are_exact_at_one_step_per_block(cache, wish) -> None:
    model = endless(small_model())
    settings = dataclasses.replace(PLAIN, **wish)
    assert sample(model, PROMPTS, dataclasses.replace(settings, cache=cache)) == sample(model, PROMPTS, settings)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_row_runs_no_more_passes_in_a_batch_than_alone(cache) -> None:
    model = endless(small_model())
    run: list[int] = []
    model.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: run.append(len(given[0])))
    answers = sample(model, PROMPTS, dataclasses.replace(PLAIN, threshold=0.5, cache=cache))
    assert len({answer.passes for answer in answers}) > 1
    assert sum(run) < len(PROMPTS) * len(run)
    assert sum(run) == sum(answer.passes for answer in answers)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("wish", [{}, {"threshold": 0.1}, {"factor": 1.2, "cfg_scale": 0.5}], ids=str)
def test_cached_batches_equal_cached_single_runs(cache, wish) -> None:
    model = small_model()
    model.eos_ids = set(range(0, 640, 12))  # rows end at different times, and leave the batch
    settings = dataclasses.replace(PLAIN, cache=cache, **wish)
    together = sample(model, PROMPTS, settings)
    assert [answer for prompt in PROMPTS for answer in sample(model, [prompt], settings)] == together
    assert any(answer.stopped for answer in together)


@pytest.mark.parametrize("config", [BLOCKY, CAUSAL], ids=["block", "causal"])
@pytest.mark.parametrize("wish", [{}, {"threshold": 0.1}, {"steps": 5}, {"cfg_scale": 0.5}], ids=str)
@pytest.mark.parametrize("ends", [set(), set(range(0, 640, 12))], ids=["endless", "ending"])
def test_block_caches_change_neither_ids_nor_passes(config, wish, ends) -> None:
    model = small_model(config=config)
    model.eos_ids = ends
    settings = dataclasses.replace(PLAIN, **wish)
    assert sample(model, PROMPTS, dataclasses.replace(settings, cache="block")) == sample(model, PROMPTS, settings)


def test_early_stop_changes_no_text_and_saves_passes(model) -> None:
    model = small_model()
    model.eos_ids = set(range(0, 640, 12))
    stopped = sample(model, PROMPTS, PLAIN)
    went_on = sample(model, PROMPTS, dataclasses.replace(PLAIN, early_stop=False))
    assert ids(stopped) == ids(went_on)
    assert all(len(a.token_ids) < 12 or a.token_ids[-1] in model.eos_ids or not a.stopped for a in stopped)
    assert sum(a.passes for a in stopped) < sum(a.passes for a in went_on)


def test_seeds_matter_only_above_temperature_0(model) -> None:
    hot = dataclasses.replace(PLAIN, temperature=1.0)
    assert ids(sample(model, PROMPTS, hot)) == ids(sample(model, PROMPTS, hot))
    assert ids(sample(model, PROMPTS, hot)) != ids(sample(model, PROMPTS, dataclasses.replace(hot, seed=1)))
    assert ids(sample(model, PROMPTS, PLAIN)) == ids(sample(model, PROMPTS, dataclasses.replace(PLAIN, seed=1)))


def test_equal_prompts_in_one_batch_get_draws_of_their_own(model) -> None:
    one, other = sample(model, [PROMPTS[0]] * 2, dataclasses.replace(PLAIN, temperature=1.0))
    assert one.token_ids != other.token_ids


TEXTS = [[10, 11, MASK, 13, MASK, MASK, 16], [MASK, 20, 21], [30, 31, 32, 33]]


@pytest.mark.parametrize(
    "wish", [{}, {"block_size": None}, {"threshold": 0.0}, {"cache": "dual", "steps": 2}, {"cfg_scale": 1.0}], ids=str
)
def test_infilling_changes_masks_and_nothing_else(model, wish) -> None:
    settings = dataclasses.replace(PLAIN, **wish)
    answers = fill(model, TEXTS, settings)
    for text, answer in zip(TEXTS, answers, strict=True):
        assert MASK not in answer.token_ids
        assert all(new == old for new, old in zip(answer.token_ids, text, strict=True) if old != MASK)
        if settings.block_size is None:
            assert answer == fill(model, [text], settings)[0]
    assert answers[2].token_ids == TEXTS[2]
    assert answers[2].passes == 0


def test_settings_that_do_not_fit_are_refused(model) -> None:
    blocky = small_model(config=BLOCKY)
    with pytest.raises(ConfigError, match="cannot see what follows"):
        fill(blocky, TEXTS, PLAIN)
    with pytest.raises(ConfigError, match="take block"):
        sample(blocky, PROMPTS, dataclasses.replace(PLAIN, cache="dual"))
    with pytest.raises(ConfigError, match="take prefix or dual"):
        sample(model, PROMPTS, dataclasses.replace(PLAIN, cache="block"))
    with pytest.raises(DataError, match="mask token"):
        sample(model, TEXTS, PLAIN)
    with pytest.raises(DataError, match="empty"):
        sample(model, [[]], PLAIN)
    with pytest.raises(ConfigError, match="exclude"):
        Settings(threshold=0.5, factor=1.0)
    with pytest.raises(ConfigError, match="low_confidence or margin"):
        Settings(threshold=0.5, remasking="entropy")


@pytest.mark.parametrize("cache", ["none", "block"])
def test_editing_that_never_passes_is_threshold_decoding(cache) -> None:
    model = endless(small_model(config=BLOCKY))
    settings = dataclasses.replace(PLAIN, threshold=0.1, cache=cache)
    assert sample(model, PROMPTS, dataclasses.replace(settings, editing_threshold=1.0)) == sample(
        model, PROMPTS, settings
    )


@pytest.mark.parametrize("post", [0, 3])
def test_edits_stay_inside_the_block_and_end(post) -> None:
    model = endless(small_model(config=BLOCKY))
    settings = dataclasses.replace(PLAIN, threshold=0.1, editing_threshold=0.0, max_post_steps=post)
    together = sample(model, PROMPTS, settings)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert sample(model, [prompt], dataclasses.replace(settings, cache="block")) == [answer]
        assert MASK not in answer.token_ids
        state: dict[int, int] = {}
        for step in answer.steps:
            state.update(step)
        assert [state[place] for place in sorted(state)] == answer.token_ids
        blocks = [max(place for place, _ in step) // 4 for step in answer.steps if step]
        tail = len(prompt) % 4
        assert [(max(p for p, _ in s) + tail) // 4 for s in answer.steps if s] == sorted(
            (max(p for p, _ in s) + tail) // 4 for s in answer.steps if s
        )
        assert len(blocks) <= 4 * (4 + post + 1)
    if post:
        assert any(
            {place for place, _ in step} & {place for place, _ in earlier}
            for answer in together
            for earlier, step in pairwise(answer.steps)
        )
