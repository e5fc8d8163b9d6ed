"""Rounds found without decoding are those of real greedy decoding, prompt by prompt, whatever the draft."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dllm.config.params import Target
from dllm.decoding import walk as walking
from dllm.decoding.speculative import Decoder
from dllm.decoding.walk import GreedyText, Walker
from dllm.models import targets
from dllm.models.drafts.config import FULL, SLIDING
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.drafts.dflash2 import DFlash2Config, DFlash2Draft
from dllm.models.drafts.protocol import TargetIO
from dllm.models.taps import compute
from tests.decoding.stand_in_drafts import ScriptedDraft, config

BLOCK, LONGEST = 6, 44
PROMPTS = [[1, 300, 20, 45, 301, 77, 5, 810, 33, 640, 12], [1, 9, 700], [7] * 20]


@pytest.fixture(scope="module")
def model():
    return targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")


@pytest.fixture(scope="module")
def responses(model) -> list[list[int]]:
    plain = Decoder(model)
    return [plain.generate(prompt, max_new_tokens=LONGEST + BLOCK).token_ids for prompt in PROMPTS]


def features(model, draft, texts: list[GreedyText]) -> list[torch.Tensor]:
    return compute(model, draft.config.target_layer_ids, [text.ids for text in texts])


def target_of(model) -> TargetIO:
    return TargetIO(model.get_input_embeddings(), model.get_output_embeddings())


@functools.cache
def new_draft(model, **changes) -> DFlashDraft:
    draft = DFlashDraft(config(model, BLOCK, **changes))
    draft.reset_parameters(seed=5, std=0.2)
    return draft


@pytest.fixture(scope="module")
def trained(model, responses) -> DFlashDraft:
    """A draft that knows half of the text by heart: rounds of every length come up."""
    draft = DFlashDraft(config(model, BLOCK))
    draft.reset_parameters(seed=5, std=0.1)
    texts = [GreedyText([*p, *r], len(p), stopped=False) for p, r in zip(PROMPTS, responses, strict=True)]
    known = torch.nn.utils.rnn.pad_sequence(features(model, draft, texts), batch_first=True).clone()
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text.ids) for text in texts], batch_first=True)
    anchor = torch.stack([torch.arange(len(p), len(p) + LONGEST - 1) for p in PROMPTS])
    labels = torch.stack([ids.gather(1, anchor + k) for k in range(BLOCK)], -1)
    masked = labels.clone()
    masked[..., 1:] = draft.config.mask_token_id
    embeds, head = model.get_input_embeddings().weight[masked].clone(), model.get_output_embeddings().weight.clone()
    optimizer = torch.optim.AdamW(draft.parameters(), lr=5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        logits = F.linear(draft(embeds, known, anchor, torch.ones_like(anchor, dtype=torch.bool)), head)
        F.cross_entropy(logits.flatten(0, 2), labels[..., 1:].flatten()).backward()
        optimizer.step()
    return draft.eval()


@functools.cache
def selecting_draft(model, **changes) -> DFlash2Draft:
    """A random DFlash 2 draft, whose choice of a token depends on the one before."""
    own = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 8, "selector_top_k": 4}
    draft = DFlash2Draft(DFlash2Config(**vars(config(model, BLOCK, **changes)), **own))
    draft.reset_parameters(seed=2)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return draft


def walked(model, draft, texts: list[GreedyText], limit: int | None, block_size: int = 0, at_once: int = 1):
    walker = Walker(draft, target_of(model), block_size, model.config.max_position_embeddings, at_once)
    return walker.rounds([replace(text, limit=limit) for text in texts], features(model, draft, texts))


@functools.cache
def decoded(model, draft, limit: int, block_size: int = 0, stops: frozenset[int] = frozenset()):
    decoder = Decoder(model, draft, block_size)
    found = [decoder.generate(prompt, max_new_tokens=limit, stop_ids=stops) for prompt in PROMPTS]
    return [[r.counts for r in answer.rounds] for answer in found]


def texts_of(responses: list[list[int]], limit: int, stops: frozenset[int] = frozenset()) -> list[GreedyText]:
    """Text with what decoding may look at behind its limit, cut after a stop id."""
    texts = []
    for prompt, response in zip(PROMPTS, responses, strict=True):
        known = response[: limit + BLOCK - 2]
        end = next((index for index, token in enumerate(known) if token in stops), None)
        known = known if end is None else known[: end + 1]
        texts.append(GreedyText([*prompt, *known], len(prompt), stopped=end is not None))
    return texts


@pytest.mark.parametrize("at_once", [1, 12, 1000], ids=["one walk", "several", "every anchor"])
@pytest.mark.parametrize("kind", ["random", "trained", "DFlash 2"])
def test_the_rounds_of_decoding(model, responses, trained, kind, at_once) -> None:
    draft = trained if kind == "trained" else new_draft(model) if kind == "random" else selecting_draft(model)
    for block_size, limit in itertools.product([2, 4, BLOCK], [1, 2, 7, LONGEST]):
        expected = decoded(model, draft, limit, block_size)
        assert walked(model, draft, texts_of(responses, limit), limit, block_size, at_once) == expected
        if (kind, block_size, limit) == ("trained", BLOCK, LONGEST):
            lengths = {counts.num_emitted for rounds in expected for counts in rounds}
            assert {1, BLOCK} < lengths, "rounds in which nothing is accepted, a part, and all"


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 7])
def test_windows_and_causality(model, responses, trained, window, is_causal) -> None:
    kinds = (FULL,) if window is None else (SLIDING,)
    draft = DFlashDraft(replace(trained.config, layer_types=kinds, sliding_window=window, is_causal=is_causal))
    draft.load_state_dict(trained.state_dict())
    texts = texts_of(responses, LONGEST)
    assert walked(model, draft, texts, LONGEST, at_once=12) == decoded(model, draft, LONGEST)


@pytest.mark.parametrize("make", [new_draft, selecting_draft], ids=["DFlash", "DFlash 2"])
@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 7, "is_causal": False},  # as published DFlash 2 drafts
        {"sliding_window": 7, "is_causal": None, "layer_types": (SLIDING, FULL), "num_hidden_layers": 2},
        {"sliding_window": 7, "is_causal": False, "layer_types": (FULL, SLIDING), "num_hidden_layers": 2},
        {"is_causal": True},
    ],
    ids=["window", "mixed", "mixed, not causal", "full, causal"],
)
def test_windows_of_each_family_and_layers_of_both_types(model, responses, make, changes) -> None:
    draft, texts = make(model, **changes), texts_of(responses, LONGEST)
    for at_once in (1, 12):
        assert walked(model, draft, texts, LONGEST, at_once=at_once) == decoded(model, draft, LONGEST)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 12])
def test_stop_ids_anywhere_in_a_block(model, responses, trained, at_once) -> None:
    ended = 0
    for index in range(1, LONGEST, 3):
        stops = frozenset({responses[0][index], responses[1][(index * 7) % LONGEST]})
        expected = decoded(model, trained, LONGEST, stops=stops)
        assert walked(model, trained, texts_of(responses, LONGEST, stops), LONGEST, at_once=at_once) == expected
        ended += sum(rounds[-1].num_emitted == rounds[-1].num_accepted for rounds in expected if rounds)
    assert ended > 5, "a stop id among the accepted draft tokens"


@pytest.mark.parametrize("window", [None, 5])
def test_blocks_that_the_targets_last_position_cuts(responses, window) -> None:
    model = targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")
    draft = new_draft(model, sliding_window=window)
    for room in range(2, 9):
        model.config.max_position_embeddings = max(map(len, PROMPTS)) + room
        texts = [
            GreedyText([*p, *r][: model.config.max_position_embeddings], len(p), stopped=False)
            for p, r in zip(PROMPTS, responses, strict=True)
        ]
        assert walked(model, draft, texts, LONGEST) == decoded.__wrapped__(model, draft, LONGEST)


class SpokenDraft(ScriptedDraft):
    """A scripted draft whose hidden state is the anchor's position, from which it says its tokens."""

    def forward(self, embeds_BNLD, features_BSF, anchor_BN, keep_BN):
        return anchor_BN[:, :, None, None].expand(embeds_BNLD[:, :, 1:].shape)

    def greedy_tokens(self, hidden_NPD, anchor_ids_N, target):
        slots = range(1, hidden_NPD.shape[1] + 1)
        return torch.tensor([[self.say(int(start) + k) for k in slots] for start in hidden_NPD[:, 0, 0]])


@pytest.mark.parametrize("period", [1, 2, 5, 7, 1000])
def test_a_scripted_draft(model, responses, period) -> None:
    ids = [*PROMPTS[0], *responses[0]]

    def say(position: int) -> int:
        return 3 if position % period == 0 or position >= len(ids) else ids[position]

    draft = SpokenDraft(config(model, BLOCK), say, model.config.max_position_embeddings)
    for limit in range(1, 20):
        answer = Decoder(model, draft).generate(PROMPTS[0], max_new_tokens=limit)
        for at_once in (1, 9, 1000):
            found = walked(model, draft, texts_of(responses, limit)[:1], limit, at_once=at_once)
            assert found == [[r.counts for r in answer.rounds]]


def test_a_round_that_the_text_does_not_determine_is_left_out(model, responses, trained) -> None:
    whole = decoded(model, trained, LONGEST)
    for length in range(2, LONGEST, 3):
        texts = [GreedyText([*p, *r[:length]], len(p), stopped=False) for p, r in zip(PROMPTS, responses, strict=True)]
        for known, rounds in zip(walked(model, trained, texts, None), whole, strict=True):
            assert known == rounds[: len(known)]
            assert sum(c.num_emitted for c in rounds[: len(known) + 1]) >= length - 1


def test_a_text_is_walked_as_alone(model, responses, trained) -> None:
    texts = texts_of(responses, LONGEST)
    texts[1] = GreedyText(texts[1].ids[:12], texts[1].prompt_length, stopped=True)
    together = walked(model, trained, texts, LONGEST, at_once=20)
    assert together == [walked(model, trained, [text], LONGEST, at_once=1)[0] for text in texts]


def test_the_head_reads_a_part_of_a_response_at_a_time(model, responses, trained, monkeypatch) -> None:
    texts = texts_of(responses, LONGEST)
    whole = list(walking.walk(model, trained, texts))
    monkeypatch.setattr(walking, "LOGITS_AT_ONCE", 3 * trained.config.vocab_size)
    assert list(walking.walk(model, trained, texts)) == whole
    assert all(each.greedy_tokens == len(texts[each.index].ids) - texts[each.index].prompt_length for each in whole)
