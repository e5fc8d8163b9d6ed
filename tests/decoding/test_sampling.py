"""Sampling with a draft follows the target's distribution, token by token and jointly, whatever the draft."""

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dllm.decoding.sampling import TargetSampling, samplings, verify
from dllm.decoding.settings import SampledSettings
from dllm.decoding.speculative import Decoder
from dllm.decoding.together import decode_together
from dllm.errors import ModelError
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.drafts.dflash2 import DFlash2Config, DFlash2Draft
from dllm.models.drafts.proposal import Proposal, Sampling
from dllm.models.drafts.sizing import for_target
from tests.decoding.stand_in_drafts import ScriptedDraft

VOCAB = 6
PROMPT = [1, 3, 2, 5]


def sampling(seed: int = 0, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> TargetSampling:
    return TargetSampling(Sampling(temperature, torch.Generator().manual_seed(seed)), top_p, top_k)


def chi_square(counts: Counter, law: dict) -> float:
    """Return how many standard deviations the statistic lies above its mean; rare cells are pooled."""
    draws = sum(counts.values())
    assert all(law[cell] > 0 for cell in counts), "a token that the target never generates"
    cells = [(counts[cell], draws * p) for cell, p in law.items() if draws * p >= 5]
    rare = (
        sum(counts[cell] for cell, p in law.items() if draws * p < 5),
        sum(draws * p for p in law.values() if draws * p < 5),
    )
    cells += [rare] if rare[1] >= 5 else []
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


# A Markov chain as the target: its joint law is known, and a block costs nothing.
TABLE_VV = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(4)) * 1.5
LENGTH = 3


def joint_law(law, start: int) -> dict[tuple[int, ...], float]:
    found = {}
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        path = (start, *tokens)
        found[tokens] = float(torch.stack([law(TABLE_VV[a])[b] for a, b in itertools.pairwise(path)]).prod())
    return found


def sharp(*tokens: int) -> Tensor:
    """A draft's distribution: almost all on one token per slot."""
    probs_PV = torch.full((len(tokens), VOCAB), 0.02)
    probs_PV[range(len(tokens)), list(tokens)] = 0.9
    return probs_PV


def drafts() -> dict:
    """Each returns a proposal for the two tokens after an anchor."""

    def sampled(probs_of):
        def propose(anchor: int, draws: Sampling) -> Proposal:
            probs_PV = probs_of(anchor)
            return Proposal(draws.draw(probs_PV), probs_PV)

        return propose

    def walk(anchor: int, draws: Sampling) -> Proposal:
        """Each token's distribution depends on the one drawn before it."""
        ids, rows = [], []
        for _ in range(2):
            rows.append(torch.softmax(TABLE_VV[anchor].flip(0), -1))
            anchor = int(draws.draw(rows[-1][None]))
            ids.append(anchor)
        return Proposal(torch.tensor(ids), torch.stack(rows))

    return {
        "none": None,
        "flat": sampled(lambda a: torch.full((2, VOCAB), 1 / VOCAB)),
        "like the target": sampled(lambda a: torch.softmax(TABLE_VV[[a, a]], -1)),
        "elsewhere": sampled(lambda a: sharp(int(TABLE_VV[a].argmin()), 0)),
        "not normalised": sampled(lambda a: 3 * sharp(int(TABLE_VV[a].argmax()), 2)),
        "walk": walk,
        "most probable": lambda a, draws: Proposal(TABLE_VV[a].topk(2).indices),
        "least probable": lambda a, draws: Proposal(TABLE_VV[a].topk(2, largest=False).indices),
    }


def decode_table(propose, how: TargetSampling) -> tuple[int, ...]:
    tokens: list[int] = [0]
    while len(tokens) <= LENGTH:
        proposal = None if propose is None else propose(tokens[-1], how.sampling)
        block = [tokens[-1], *([] if proposal is None else proposal.ids_P.tolist())]
        tokens += verify(proposal, TABLE_VV[block], how).tokens
    return tuple(tokens[1 : LENGTH + 1])


CUTS = {"temperature": 0.6, "top_k": 4, "top_p": 0.9}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cuts"),
    [*((name, {}) for name in drafts()), *((name, CUTS) for name in ("walk", "most probable", "like the target"))],
    ids=str,
)
def test_the_first_tokens_have_the_targets_joint_law(name: str, cuts: dict) -> None:
    how = sampling(seed=11, **cuts)
    counts = Counter(decode_table(drafts()[name], how) for _ in range(2000))
    assert chi_square(counts, joint_law(how.law, 0)) < 3.5


def test_the_check_of_the_law_tells_laws_apart() -> None:
    how = sampling(seed=11)
    counts = Counter(decode_table(None, how) for _ in range(3000))
    assert chi_square(counts, joint_law(sampling(temperature=1.15).law, 0)) > 5


@pytest.mark.parametrize("name", ["walk", "like the target", "elsewhere", "most probable", "least probable"])
def test_chances_are_the_expected_acceptance(name: str) -> None:
    how, expected, accepted, rounds = sampling(seed=3), 0.0, 0, 2000
    for _ in range(rounds):
        proposal = drafts()[name](0, how.sampling)
        found = verify(proposal, TABLE_VV[[0, *proposal.ids_P.tolist()]], how)
        assert len(found.chances) == min(2, len(found.tokens)) and all(0 <= c <= 1 + 1e-9 for c in found.chances)
        expected, accepted = expected + sum(found.chances), accepted + len(found.tokens) - 1
    assert abs(expected - accepted) / rounds < 0.04


@pytest.mark.parametrize("top_k", [0, 1, 3, 6, 100])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("vocab", [6, 400])
def test_the_law_is_a_tempered_softmax_over_the_top_tokens(top_k: int, top_p: float, vocab: int) -> None:
    logits_V = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 0.5
    order = sorted(range(vocab), key=lambda token: -logits_V[token])[: top_k or vocab]
    weights = torch.softmax(logits_V[order].double() / 0.7, -1)
    kept = int((weights.cumsum(0) - weights < top_p).sum())
    wanted_V = torch.zeros(vocab, dtype=torch.float64)
    wanted_V[order[:kept]] = weights[:kept] / weights[:kept].sum()
    torch.testing.assert_close(sampling(temperature=0.7, top_p=top_p, top_k=top_k).law(logits_V), wanted_V)


def test_equal_logits_count_by_their_ids_as_argmax_does() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0])
    assert sampling(top_k=1).law(logits_V).nonzero()[:, 0].tolist() == [1]
    assert sampling(top_k=2).law(logits_V).nonzero()[:, 0].tolist() == [1, 3]
    assert sampling(top_p=0.4).law(logits_V).nonzero()[:, 0].tolist() == [1, 3]


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ModelError, match="logits are not numbers"):
        verify(None, torch.tensor([[1.0, float("nan")]]), sampling())
    with pytest.raises(ModelError, match="logits are not numbers"):  # the draft's
        sampling().sampling.law(torch.tensor([[1.0, float("nan")]]))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes)).eval()


def draft_of(model, name: str):
    shape = for_target(model.config, num_hidden_layers=1, block_size=3, mask_token_id=4, target_layer_ids=(0,))
    if name == "none":
        return None
    if name == "scripted":
        return ScriptedDraft(shape, lambda position: position % VOCAB, 2048)
    if name == "dflash2":
        sizes = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 4, "selector_top_k": 3}
        draft: DFlashDraft = DFlash2Draft(DFlash2Config(**vars(shape), **sizes))
    else:
        draft = DFlashDraft(shape)
    draft.reset_parameters(seed=1, std=0.4)
    return draft


@pytest.mark.parametrize("name", ["none", "scripted", "dflash", "dflash2"])
@pytest.mark.parametrize("cuts", [{"top_k": 1, "temperature": 2.0}, {"temperature": 1e-6}, {"top_p": 1e-12}], ids=str)
def test_cuts_to_one_token_are_greedy(model, name: str, cuts: dict) -> None:
    decoder, limits = Decoder(model, draft_of(model, name)), {"max_new_tokens": 16}
    greedy = Decoder(model).generate(PROMPT, **limits).token_ids
    assert decoder.generate(PROMPT, sampling=sampling(**cuts), **limits).token_ids == greedy


def test_a_seed_gives_the_same_response_and_equal_prompts_different_ones(model) -> None:
    decoder = Decoder(model, draft_of(model, "dflash"))

    def responses(prompts: list[list[int]], seed: int) -> list[list[int]]:
        drawn = samplings(prompts, SampledSettings(temperature=1.0, seed=seed))
        pairs = zip(prompts, drawn, strict=True)
        return [decoder.generate(ids, max_new_tokens=24, sampling=how).token_ids for ids, how in pairs]

    one, again, other = responses([PROMPT] * 2, 0), responses([PROMPT, [2], PROMPT], 0), responses([PROMPT], 1)
    assert one == [again[0], again[2]] and one[0] != one[1] and one[0] != other[0]
    assert samplings([PROMPT], SampledSettings()) == [None]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dflash", "dflash2"])
@pytest.mark.parametrize("cuts", [{"top_k": 5}, {"top_k": 4, "top_p": 0.9}], ids=str)
def test_a_models_first_tokens_have_its_joint_law(model, name: str, cuts: dict) -> None:
    how = sampling(seed=2, temperature=0.8, **cuts)
    prefixes = torch.tensor([[*PROMPT, a, b] for a, b in itertools.product(range(VOCAB), repeat=2)])
    with torch.inference_mode():
        logits_NSV = model(prefixes).logits[:, len(PROMPT) - 1 :]
    law = {}
    for (_, a, b), (first_V, second_V, third_V) in zip(prefixes[:, -3:].tolist(), logits_NSV, strict=True):
        before = float(how.law(first_V)[a] * how.law(second_V)[b])
        law |= {(a, b, c): before * float(p) for c, p in enumerate(how.law(third_V))}
    asked = [PROMPT] * 3000
    drawn = samplings(asked, SampledSettings(temperature=0.8, seed=2, **cuts))
    decoder = Decoder(model, draft_of(model, name))
    found = decode_together(decoder, asked, max_new_tokens=LENGTH, batch_size=250, samplings=drawn)
    assert chi_square(Counter(tuple(answer.token_ids) for _, answer in found), law) < 3.5
