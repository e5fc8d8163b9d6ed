"""Laws of editing, pass by pass: what is written, what is written over, and when it ends."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import Generation, sample
from tests.decoding.watched import Watched
from tests.models.small_models import MASK

PROMPT = list(range(23, 31))
START, NEW = len(PROMPT), 8


def written(watched: Watched, asked: Settings) -> tuple[Generation, list[torch.Tensor]]:
    """Generate from the prompt; return also the ids that each pass was shown, up to the block's end."""
    (answer,) = sample(watched.model, [PROMPT], asked)
    assert len(watched.shown) == len(answer.steps)
    return answer, [ids_1K[0] for ids_1K in watched.shown]


@torch.no_grad()
def said(watched: Watched, ids_K: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Say how sure the model is of its best token at each position of the last block, and which that is.

    Shapes: returns chance_C and token_C.
    """
    block_K = torch.div(torch.arange(len(ids_K)) - START, size, rounding_mode="floor").clamp_min(-1)
    hidden_1KD = watched.model.hidden(ids_K[None], allowed_BSS=(block_K[None] <= block_K[:, None])[None])
    logits_CV = watched.model.logits(hidden_1KD[0, -size:])
    logits_CV[:, MASK] = -torch.inf
    return logits_CV.softmax(-1).max(-1)


@settings(max_examples=25)
@given(st.sampled_from([None, 0.02, 0.3]), st.floats(0, 0.4), st.integers(0, 5), st.integers(0, 20))
def test_a_pass_edits_where_another_token_is_surer_than_its_threshold(tau, tau_edit, post, seed) -> None:
    """Laws: edits = {(i, t): no mask at i, p_i > tau_edit, t not what stands there}; of the masks the surest go, all
    above tau and at least one; no place is in both; a block goes on while it has masks, and then until a pass that
    was shown none edits nothing, but for no more than `post` such passes."""
    size, watched = 4, Watched("block", seed=seed)
    asked = Settings(
        max_new_tokens=NEW, block_size=size, threshold=tau, editing_threshold=tau_edit, max_post_steps=post
    )
    answer, shown = written(watched, asked)
    ends = [len(ids_K) for ids_K in shown]
    for number, (ids_K, step) in enumerate(zip(shown, answer.steps, strict=True)):
        begin = len(ids_K) - size
        chance_C, token_C = said(watched, ids_K, size)
        masked = [place for place in range(size) if ids_K[begin + place] == MASK]
        filled = {place - begin + START: token for place, token in step if place - begin + START in masked}
        edited = {(place - begin + START, token) for place, token in step if place - begin + START not in masked}
        assert edited == {
            (place, int(token_C[place]))
            for place in set(range(size)) - set(masked)
            if chance_C[place] > tau_edit and token_C[place] != ids_K[begin + place]
        }
        above = sum(bool(chance_C[place] > tau) for place in masked) if tau is not None else 0
        surest = sorted(masked, key=lambda place: -float(chance_C[place]))[: max(1, above)]
        assert filled == {place: int(token_C[place]) for place in surest}
        assert len(step) == len(filled) + len(edited)
        idle = sum(MASK not in earlier for earlier in shown[: number + 1] if len(earlier) == len(ids_K))
        goes_on = ends[number + 1 :][:1] == [len(ids_K)]
        assert goes_on == (len(filled) < len(masked) or (bool(masked or edited) and idle < post))
    assert all(ends.count(end) <= size + post for end in ends)


@settings(max_examples=15)
@given(st.floats(0, 0.4), st.integers(0, 4), st.integers(0, 20))
def test_a_pass_shows_what_the_passes_before_have_left(tau_edit, post, seed) -> None:
    """Laws: the prompt stays; each canvas is the last one with the step's tokens; so is the response."""
    watched = Watched("block", seed=seed)
    asked = Settings(max_new_tokens=NEW, block_size=4, editing_threshold=tau_edit, max_post_steps=post)
    answer, shown = written(watched, asked)
    states = [[*ids_K.tolist(), *[MASK] * (START + NEW - len(ids_K))] for ids_K in shown]
    for (before, after), step in zip(pairwise([*states, [*PROMPT, *answer.token_ids]]), answer.steps, strict=True):
        expected = list(before)
        for place, token in step:
            expected[START + place] = token
        assert after == expected and after[:START] == PROMPT


def test_edits_end_where_a_pass_finds_nothing_to_edit() -> None:
    """Law: without a mask and without an edit a step is a fixed point, and the last, and was shown the response."""
    watched = Watched("block", scale=0.3)
    asked = Settings(max_new_tokens=NEW, block_size=NEW, threshold=0.3, editing_threshold=0.1, max_post_steps=16)
    answer, shown = written(watched, asked)
    assert answer.steps[-1] == [] and all(answer.steps[:-1])
    assert answer.passes <= NEW + 16 + 1
    assert shown[-1].tolist() == [*PROMPT, *answer.token_ids]
    places = [place for step in answer.steps for place, _ in step]
    assert len(places) > len(set(places)) == NEW  # some were edited on the way
