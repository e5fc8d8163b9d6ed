"""Our drafts against the decoder that the authors of DFlash publish: forward, ids and acceptance of the same export."""

import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dllm.config.params import Target
from dllm.decoding.speculative import Decoder
from dllm.methods.dflash.anchors import draw_anchors
from dllm.methods.dflash.objective import Batch, dflash_terms
from dllm.models import targets
from dllm.models.drafts.checkpoint import load_draft, save_draft
from dllm.models.drafts.config import FULL, SLIDING
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.drafts.dflash2 import DFlash2Config, DFlash2Draft
from dllm.models.drafts.dflash2_settings import DFlash2Settings
from dllm.models.drafts.protocol import Draft
from dllm.models.drafts.sizing import for_target
from dllm.models.taps import compute

published = pytest.importorskip("dflash.model", reason="the package dflash is not installed: make setup")
BLOCK, TOKENS = 6, 24
PROMPTS = [[1, 300 + i, 20, 45 + 3 * i, 301, 77] for i in range(3)]
OWN = SimpleNamespace(dflash2=DFlash2Settings())


@pytest.fixture(scope="module")
def model():
    return targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")


def new_draft(model, family: str) -> Draft:
    sizes = {"num_hidden_layers": 2, "block_size": BLOCK, "mask_token_id": 3, "taps": 3}
    draft: Draft = DFlashDraft(for_target(model.config, **sizes))
    if family == "dflash2":  # windows that are not causal, as in the published ones, and shorter than the context
        plain = for_target(model.config, **sizes, sliding_window=11, is_causal=False)
        own = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 16, "selector_top_k": 8}
        draft = DFlash2Draft(DFlash2Config(**vars(plain), **own))
    draft.reset_parameters(0)
    return draft


def train(draft: Draft, model, steps: int = 35) -> None:
    """Learn the target's own responses by heart, so that rounds of every length are accepted."""
    responses = [[*prompt, *Decoder(model).generate(prompt, max_new_tokens=TOKENS).token_ids] for prompt in PROMPTS]
    ids_BS = torch.tensor(responses)
    supervised_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    supervised_BS[:, : len(PROMPTS[0])] = False
    features_BSF = torch.stack(compute(model, draft.config.target_layer_ids, responses)).clone()
    batch = Batch(ids_BS, supervised_BS, features_BSF)
    embedding_VD, head_VD = model.get_input_embeddings().weight, model.get_output_embeddings().weight.detach()
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    for step in range(steps):
        anchors = draw_anchors(
            supervised_BS, num_blocks=12, block_size=BLOCK, sampling="without_replacement", seeds=[step] * len(PROMPTS)
        )
        terms = dflash_terms(draft, embedding_VD.detach(), head_VD, batch, anchors, OWN, gamma=0.0)
        (terms.numerator / terms.denominator).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module", params=[(f, t) for f in ("dflash", "dflash2") for t in (False, True)], ids=str)
def pair(request, model, tmp_path_factory) -> tuple[Draft, torch.nn.Module, bool]:
    """Our draft and the published class, loaded from one export."""
    family, trained = request.param
    folder: Path = tmp_path_factory.mktemp("export")
    draft = new_draft(model, family)
    if trained:
        train(draft, model)
    elif family == "dflash2":  # a new one would be plain DFlash
        torch.manual_seed(3)
        for parameter in draft.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    save_draft(draft, folder)
    kind = published.DFlash2DraftModel if family == "dflash2" else published.DFlashDraftModel
    return load_draft(folder, model.config), kind.from_pretrained(folder).eval(), trained


@torch.no_grad()
def test_hidden_states_agree(pair, model) -> None:
    ours, theirs, _ = pair
    torch.manual_seed(0)
    features = torch.randn(1, 9, model.config.hidden_size * len(ours.config.target_layer_ids))
    embeds = torch.randn(1, BLOCK, model.config.hidden_size)
    found = ours.run_block(embeds, features, 9, ours.new_cache())
    want = theirs(torch.arange(9 + BLOCK)[None], noise_embedding=embeds, target_hidden=features)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


def whole_rounds(lengths: list[int]) -> list[int]:
    """Keep the rounds that began with room for a whole block: theirs cuts the later ones at the limit."""
    done = [1 + sum(lengths[:index]) for index in range(len(lengths))]
    return [length for length, before in zip(lengths, done, strict=True) if before + BLOCK <= TOKENS]


def test_greedy_ids_and_acceptance_agree(pair, model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "_cuda_time", time.perf_counter)  # it asks CUDA to synchronize, and there is none
    ours, theirs, trained = pair
    lengths = []
    for prompt in [*PROMPTS, [1, 7, 9]]:
        found = Decoder(model, ours).generate(prompt, max_new_tokens=TOKENS)
        want = published.dflash_generate(theirs, model, torch.tensor([prompt]), TOKENS, None, return_stats=True)
        assert found.token_ids == want.output_ids[0, len(prompt) :].tolist()
        emitted = whole_rounds([r.counts.num_emitted for r in found.rounds])
        assert emitted == whole_rounds(want.acceptance_lengths)
        lengths += emitted
    assert not trained or sum(lengths) / len(lengths) > 1.5, "a trained draft is accepted now and then"
    assert not trained or len(set(lengths)) > 2, "rounds of several lengths"


def test_windows_and_causality_of_every_kind_agree(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "_cuda_time", time.perf_counter)
    sizes = {"num_hidden_layers": 2, "block_size": BLOCK, "mask_token_id": 3, "taps": 3, "sliding_window": 7}
    trained = DFlashDraft(for_target(model.config, **sizes, layer_types=(SLIDING, FULL)))
    trained.reset_parameters(0, std=0.1)
    train(trained, model, steps=8)
    lengths = {}
    for kinds, is_causal in product(((FULL, FULL), (SLIDING, SLIDING), (SLIDING, FULL)), (None, True, False)):
        draft = DFlashDraft(replace(trained.config, layer_types=kinds, is_causal=is_causal))
        draft.load_state_dict(trained.state_dict())
        save_draft(draft, tmp_path)
        theirs = published.DFlashDraftModel.from_pretrained(tmp_path).eval()
        ours = load_draft(tmp_path, model.config)
        lengths[kinds, is_causal] = ()
        for prompt in PROMPTS[:2]:
            found = Decoder(model, ours).generate(prompt, max_new_tokens=TOKENS)
            want = published.dflash_generate(theirs, model, torch.tensor([prompt]), TOKENS, None, return_stats=True)
            assert found.token_ids == want.output_ids[0, len(prompt) :].tolist()
            emitted = [r.counts.num_emitted for r in found.rounds]
            assert whole_rounds(emitted) == whole_rounds(want.acceptance_lengths)
            lengths[kinds, is_causal] += tuple(emitted)
    assert len(set(lengths.values())) >= 4, "windows and causality change what is accepted"
