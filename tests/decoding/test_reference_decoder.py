"""Decoding with windows and causality of every kind, held against the reference decoder (PyPI's `dflash`)."""

import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm.config.params import Target
from dllm.decoding.speculative import Decoder
from dllm.methods.dflash.anchors import draw_anchors
from dllm.methods.dflash.objective import Batch, dflash_terms
from dllm.models import targets
from dllm.models.drafts.checkpoint import load_draft, save_draft
from dllm.models.drafts.config import FULL, SLIDING, DFlashConfig, for_target
from dllm.models.drafts.dflash import DFlashDraft

reference = pytest.importorskip("dflash.model")

PROMPT = [1, 300, 20, 45, 301, 77, 500, 12, 9, 340]
TOKENS, WINDOW, BLOCK = 60, 7, 5


@pytest.fixture(scope="module")
def model() -> Any:
    return targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")


def config(model: Any, kinds: tuple[str, ...], is_causal: bool | None) -> DFlashConfig:
    return for_target(
        model.config, num_hidden_layers=len(kinds), block_size=BLOCK, mask_token_id=3, taps=3, layer_types=kinds,
        sliding_window=WINDOW if SLIDING in kinds else None, is_causal=is_causal,
    )  # fmt: skip


@pytest.fixture(scope="module")
def weights(model: Any) -> dict[str, torch.Tensor]:
    """Of a draft that has learnt most of one greedy response, so that rounds differ in length."""
    draft = DFlashDraft(config(model, (SLIDING, FULL), None))
    draft.reset_parameters(seed=0, std=0.1)
    ids = torch.tensor([PROMPT + Decoder(model).generate(PROMPT, max_new_tokens=TOKENS).token_ids])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    features = torch.cat([states[layer + 1] for layer in draft.config.target_layer_ids], -1)
    supervised = (torch.arange(ids.shape[1]) >= len(PROMPT))[None]
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    for step in range(16):
        anchors = draw_anchors(
            supervised, num_blocks=24, block_size=BLOCK, sampling="without_replacement", seeds=[step]
        )
        sums = dflash_terms(draft, embedding, head, Batch(ids, supervised, features), anchors, gamma=4.0)
        (sums.numerator / sums.denominator).backward()
        optimizer.step()
        optimizer.zero_grad()
    return draft.state_dict()


def test_ids_and_rounds_are_those_of_the_reference_decoder(
    model: Any, weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_cuda_time", time.perf_counter)  # it has no other clock
    lengths = {}
    for kinds, is_causal in product(((FULL, FULL), (SLIDING, SLIDING), (SLIDING, FULL)), (None, True, False)):
        draft = DFlashDraft(config(model, kinds, is_causal))
        draft.load_state_dict(weights)
        folder = tmp_path / f"{kinds}-{is_causal}"
        save_draft(draft, folder)
        other = reference.DFlashDraftModel.from_pretrained(folder, dtype=torch.float32).eval()
        expected = reference.dflash_generate(
            other, model, torch.tensor([PROMPT]), max_new_tokens=TOKENS, stop_token_ids=None, return_stats=True
        )
        found = Decoder(model, load_draft(folder, model.config)).generate(PROMPT, max_new_tokens=TOKENS)
        assert found.token_ids == expected.output_ids[0, len(PROMPT) :].tolist()
        lengths[kinds, is_causal] = [len(each.tokens) for each in found.rounds]
        assert lengths[kinds, is_causal] == expected.acceptance_lengths
    differ = {tuple(each) for each in lengths.values()}
    assert len(differ) == 7, "two layers of one type have their type's causality by default, all else matters"
