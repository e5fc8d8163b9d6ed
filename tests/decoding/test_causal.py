"""Causal decoding, seeded blocks and self-speculation of models that write both ways."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dllm.decoding.causal import decode_causally, decode_seeded, speculate_on_itself
from dllm.decoding.settings import Settings
from dllm.errors import ConfigError
from dllm.models.diffusion.cache import CanvasCache
from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.protocol import DiffusionLM
from tests.models.small_models import FAMILIES, MASK, small_model

PROMPTS = [[21, 22, 23, 24, 25], [40, 41], [60, 61, 62, 63, 64, 65, 66, 67, 68]]
WISH = Settings(max_new_tokens=11, block_size=4)


def hybrid(family: str = "Llama", window: int | None = None, ends: bool = False) -> DiffusionLM:
    model = small_model(family, window, DiffusionConfig("hybrid", MASK, 4))
    model.eos_ids = set(range(0, 640, 12)) if ends else set()
    return model


def repeats_itself(model: DiffusionLM) -> None:
    """Make every pass predict token 7: a perfect draft of a dull text."""
    model.logits = (
        lambda hidden: torch.nn.functional.one_hot(  # type: ignore[method-assign]
            torch.full(hidden.shape[:-1], 7), 640
        ).float()
    )


@pytest.mark.parametrize(("family", "window"), FAMILIES)
@pytest.mark.parametrize("ends", [False, True], ids=["endless", "ending"])
def test_self_speculation_writes_what_greedy_decoding_writes(family: str, window: int | None, ends: bool) -> None:
    model = hybrid(family, window, ends)
    plain = decode_causally(model, PROMPTS, WISH)
    spec = speculate_on_itself(model, PROMPTS, WISH)
    assert [a.token_ids for a in spec] == [a.token_ids for a in plain]
    for answer in spec:
        assert answer.passes == 1 + 2 * (len(answer.steps) - 1)
        assert all(1 <= len(step) <= 4 for step in answer.steps)
    assert all(a.passes == len(a.token_ids) for a in plain)


def test_causal_decoding_is_transformers_greedy_decoding() -> None:
    model = hybrid()
    (answer,) = decode_causally(model, PROMPTS[:1], WISH)
    model.model_config.is_causal = True
    ids = model.model.generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=11, do_sample=False, eos_token_id=None, pad_token_id=0,
        suppress_tokens=[MASK],
    )  # fmt: skip
    assert ids[0, 5:].tolist() == answer.token_ids


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(1, 6))
@example(13, 4)
def test_a_perfect_draft_takes_the_fewest_iterations(new, size) -> None:
    """Law: ceil((n - 1) / B) iterations of two passes, after the prompt's."""
    model = hybrid()
    repeats_itself(model)
    (answer,) = speculate_on_itself(model, PROMPTS[:1], Settings(max_new_tokens=new, block_size=size))
    assert answer.token_ids == [7] * new
    assert answer.passes == 1 + 2 * -(-(new - 1) // size)


@settings(max_examples=20)
@given(st.lists(st.integers(10, 400), min_size=1, max_size=9), st.integers(1, 12), st.integers(1, 6), st.booleans())
def test_a_draft_is_taken_back_up_to_what_was_accepted(prompt, new, size, perfect) -> None:
    """Law: each iteration writes keys from the last accepted token on, twice the same columns, and looks no further;
    the columns before hold what is finished: the prompt and all but one of the tokens so far."""
    model, written = hybrid(), []
    if perfect:
        repeats_itself(model)
    with pytest.MonkeyPatch.context() as patch:
        next_pass = CanvasCache.next_pass
        patch.setattr(CanvasCache, "next_pass", lambda cache, *given: written.append(given) or next_pass(cache, *given))
        (answer,) = speculate_on_itself(model, [prompt], Settings(max_new_tokens=new, block_size=size))
    expected, so_far = [], 0
    for step in answer.steps[:-1]:
        so_far += len(step)
        begin = len(prompt) + so_far - 1
        expected += [(begin, begin + size, begin + size)] * 2
    assert written[:2] == [(0, len(prompt) + new + size), (0, len(prompt), len(prompt))]
    assert written[2:] == expected
    assert [len(step) for step in answer.steps[1:]] == [size] * (len(answer.steps) - 1) or not perfect


@pytest.mark.parametrize("wish", [{}, {"threshold": 0.1}, {"factor": 1.5}, {"steps": 6}, {"temperature": 0.7}], ids=str)
def test_seeded_blocks_fill_every_position_once(wish) -> None:
    model, asked = hybrid(), Settings(max_new_tokens=11, block_size=4, **wish)
    for prompt, answer in zip(PROMPTS, decode_seeded(model, PROMPTS, asked), strict=True):
        assert MASK not in answer.token_ids
        assert len(answer.token_ids) == 11
        assert sorted(place for step in answer.steps for place, _ in step) == list(range(11))
        assert decode_seeded(model, [prompt], asked) == [answer]
        assert answer.passes == 3 + len(answer.steps) - 3  # prompt and two finished blocks; steps but the three seeds


def test_seeded_blocks_of_one_are_causal_decoding() -> None:
    model, asked = hybrid(ends=True), Settings(max_new_tokens=8, block_size=1)
    assert [a.token_ids for a in decode_seeded(model, PROMPTS, asked)] == [
        a.token_ids for a in decode_causally(model, PROMPTS, asked)
    ]


def test_self_speculation_at_a_temperature_is_refused() -> None:
    with pytest.raises(ConfigError, match="greedy"):
        speculate_on_itself(hybrid(), PROMPTS, Settings(temperature=0.5))
