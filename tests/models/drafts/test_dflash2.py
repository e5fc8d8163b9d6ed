"""DFlash 2's network: its convolutions against a plain loop, its start from DFlash, its loss and its figures."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from dllm.errors import ModelError
from dllm.methods.dflash.anchors import draw_anchors
from dllm.methods.dflash.objective import Batch, StepSums, dflash_terms
from dllm.methods.dflash.settings import Dflash
from dllm.models.drafts.checkpoint import load_draft, save_draft
from dllm.models.drafts.convolution import Convolution
from dllm.models.drafts.dflash2 import CODEBOOKS, DFlash2Config, DFlash2Draft
from dllm.models.drafts.dflash2_settings import DFlash2Settings
from dllm.models.drafts.protocol import TargetIO
from tests.models.drafts.test_attention import (
    anchors_in_12,
    check_agreement,
    cuts_of_12,
    inputs,
    run,
    shapes,
    tiny_config,
    tiny_draft,
)

SIZES = {"conv_kernel_size": 2, "conv_group_size": 4, "selector_rank": 6, "selector_top_k": 5}


def dflash2_config(**changes) -> DFlash2Config:
    sizes = {**SIZES, **{key: changes.pop(key) for key in list(changes) if key in SIZES}}
    return DFlash2Config(**vars(tiny_config(**changes)), **sizes)


def dflash2_draft(seed: int = 0, std: float = 0.3, **changes) -> DFlash2Draft:
    """A draft whose every part matters: nothing is at its start."""
    draft = DFlash2Draft(dflash2_config(**changes))
    draft.reset_parameters(seed, std)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if "conv" in name or name in CODEBOOKS:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return draft


def own(**changes) -> SimpleNamespace:
    return SimpleNamespace(dflash2=DFlash2Settings(**changes))


@pytest.mark.parametrize("taps", [1, 2, 3, 6])
def test_a_convolution_is_the_plain_loop_over_slots_taps_and_channels(taps: int) -> None:
    torch.manual_seed(0)
    conv = Convolution(32, taps, group_size=4)
    torch.nn.init.normal_(conv.base_kernel)
    x, normed = torch.randn(2, 3, 4, 32), torch.randn(2, 3, 4, 32)
    both = conv.kernel_projection(normed).view(2, 3, 4, 2, taps, 8)
    for place, delta in enumerate(conv.deltas(normed)):
        want = torch.zeros_like(x)
        for t in range(4):
            for tap in range(min(taps, t + 1)):
                coefficient = conv.base_kernel[place, tap] + both[:, :, t, place, tap].repeat_interleave(4, -1)
                want[:, :, t] += coefficient * x[:, :, t - tap]
        torch.testing.assert_close(conv.convolve(x, delta, place), want)


def test_training_forward_equals_separate_decoding_calls() -> None:
    draft = dflash2_draft()
    features, embeds, anchors = inputs(draft, [1, 5, 6, 19])
    together = run(draft, features, embeds, anchors)
    assert together.shape == (1, 4, 3, 32)
    for n, anchor in enumerate(anchors[0].tolist()):
        alone = draft.run_block(embeds[:, n], features[:, :anchor], anchor, draft.new_cache())
        torch.testing.assert_close(together[:, n], alone[:, 1:], atol=2e-5, rtol=1e-4)


@settings(max_examples=40)
@given(shape=shapes(), anchor=anchors_in_12, cuts=cuts_of_12)
def test_oracle_training_and_cached_decoding_agree(shape, anchor, cuts) -> None:
    check_agreement(dflash2_draft(**shape), anchor, cuts)


def test_a_new_draft_is_sized_by_its_own_section() -> None:
    target = SimpleNamespace(**{**asdict(tiny_config()), "num_hidden_layers": 8, "model_type": "tiny"})
    section = Dflash.model_validate(
        {"draft": {"architecture": "dflash2", "dflash2": {"selector_rank": 7, "selector_top_k": 3}}}
    ).draft
    config = DFlash2Draft.config_for(target, section, block_size=4, mask_token_id=49)
    assert (config.selector_rank, config.selector_top_k, config.conv_kernel_size, config.conv_group_size) == (
        7,
        3,
        2,
        16,
    )
    uneven = section.model_copy(update={"dflash2": DFlash2Settings(conv_group_size=5)})
    with pytest.raises(ModelError, match=r"conv_group_size 5 does not divide the hidden size 32 .*draft\.dflash2"):
        DFlash2Draft.config_for(target, uneven, block_size=4, mask_token_id=49)


def test_settings_of_another_architecture_are_refused() -> None:
    with pytest.raises(ValueError, match="dflash2: settings of another architecture than 'dflash'"):
        Dflash.model_validate({"draft": {"dflash2": {"selector_rank": 8}}})
    with pytest.raises(ValueError, match=r"dflash2\.rank"):
        Dflash.model_validate({"draft": {"architecture": "dflash2", "dflash2": {"rank": 8}}})
    assert Dflash.model_validate({"draft": {"architecture": "dflash2"}}).draft.dflash2 == DFlash2Settings()
    assert Dflash().draft.dflash2 is None


def test_it_comes_back_bit_for_bit_under_the_published_names(tmp_path: Path) -> None:
    draft = dflash2_draft()
    save_draft(draft, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["architectures"] == ["DFlash2DraftModel"] and SIZES.items() <= raw["dflash_config"].items()
    assert not SIZES.keys() & raw.keys()
    loaded = load_draft(tmp_path)
    assert type(loaded) is DFlash2Draft and loaded.config == draft.config
    for name, tensor in draft.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    published = {
        "candidate_selector.predecessor_codebook": (50, 6),
        "candidate_selector.successor_codebook": (50, 6),
        "candidate_selector.hidden_projection.weight": (6, 32),
        **{
            f"layers.{layer}.{name}.{part}": shape
            for layer in range(2)
            for name in ("attention_conv", "mlp_conv")
            for part, shape in (("base_kernel", (2, 2, 32)), ("kernel_projection.weight", (32, 32)))
        },
    }
    found = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    assert found == {name: tuple(t.shape) for name, t in tiny_draft().state_dict().items()} | published


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("conv_group_size", 5, "conv_group_size 5 does not divide"),
        ("selector_top_k", 51, "selector_top_k 51 is more than the vocabulary of 50"),
        ("selector_rank", None, "not a DFlash 2 draft: its config lacks selector_rank"),
        ("selector_rank", 0, "selector_rank must be a whole number above 0, got 0"),
        ("selector_depth", 3, "selector_depth"),
    ],
)
def test_an_impossible_config_is_refused(key: str, value: object, said: str) -> None:
    raw = dflash2_config().to_json()
    raw["dflash_config"][key] = value
    with pytest.raises(ModelError, match=said):
        DFlash2Config.from_json(raw)


def test_a_start_from_dflash_computes_the_same_bit_for_bit() -> None:
    plain = tiny_draft()
    draft = DFlash2Draft.start_from(plain, own(**SIZES), seed=3)
    assert type(draft) is DFlash2Draft and draft.config == dflash2_config()
    assert (
        draft.candidate_selector.predecessor_codebook.std() > 0.3
        and not draft.candidate_selector.successor_codebook.any()
    )
    features, embeds, anchors = inputs(plain, [1, 5, 6, 19])
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 50, bias=False)
    embed = torch.nn.Embedding(50, 32)
    with torch.no_grad():
        assert torch.equal(run(draft, features, embeds, anchors), run(plain, features, embeds, anchors))
        for anchor_id in range(5):
            ids = [
                each.propose(anchor_id, 3, features[:, :9], 9, each.new_cache(), TargetIO(embed, head)).ids_P.tolist()
                for each in (plain, draft)
            ]
            assert ids[0] == ids[1]
    assert DFlash2Draft.start_from(draft, own(), seed=0) is draft
    with pytest.raises(ModelError, match="a DFlash2DraftModel, and a DFlashDraftModel is trained"):
        type(plain).start_from(draft, own(), seed=0)


def terms_of(draft, rows=(0, 1, 2, 3), vocab_ids=None, settings=None, **options) -> StepSums:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30, (4, 24), generator=generator)
    features, table = torch.randn(4, 24, 64, generator=generator), torch.randn(50, 32, generator=generator)
    supervised = torch.ones(4, 24, dtype=torch.bool)
    supervised[:, :4] = False
    rows = list(rows)
    batch = Batch(ids[rows], supervised[rows], features[rows])
    anchors = draw_anchors(
        batch.loss_mask_BS, num_blocks=5, block_size=4, sampling="without_replacement", seeds=[9 + row for row in rows]
    )
    head = table if vocab_ids is None else table[vocab_ids]
    return dflash_terms(
        draft, table, head, batch, anchors, settings or own(), gamma=2.0, vocab_ids=vocab_ids, **options
    )


def selector_oracle(draft: DFlash2Draft, slots, weights_M, missing_label: str):
    """The selector's term and hits, slot by slot."""
    selector = draft.candidate_selector
    total, hits, at = torch.zeros(()), [], 0
    for block, valid in zip(slots.ids_BNL.flatten(0, 1), slots.valid_BNP.flatten(0, 1), strict=True):
        for p in valid.nonzero()[:, 0].tolist():
            before, label, hidden = int(block[p]), int(block[p + 1]), slots.hidden_MD[at]
            logits_V = slots.head_VD @ hidden
            gate = selector.predecessor_codebook[before] * selector.hidden_projection(hidden)
            scores_V = logits_V + selector.successor_codebook @ gate
            ids = logits_V.topk(selector.top_k).indices.tolist()
            hits.append(label in ids and ids[int(scores_V[ids].argmax())] == label)
            if label not in ids and missing_label == "insert":
                ids[-1] = label
            if label in ids:
                total = total - weights_M[at] * torch.log_softmax(scores_V[ids], -1)[ids.index(label)]
            at += 1
    return total, hits


@pytest.mark.parametrize("loss", ["decay", "dpace"])
@pytest.mark.parametrize("missing_label", ["skip", "insert"])
def test_the_selectors_term_is_the_plain_loops(monkeypatch: pytest.MonkeyPatch, loss: str, missing_label: str) -> None:
    draft, seen = dflash2_draft(), []
    settings = own(missing_label=missing_label, selector_loss_weight=0.7)
    real = DFlash2Draft.extra_loss

    def watched(self, slots, weights_M, settings):
        seen.append((slots, weights_M, real(self, slots, weights_M, settings)))
        return seen[-1][-1]

    monkeypatch.setattr(DFlash2Draft, "extra_loss", watched)
    ours = torch.autograd.grad(terms_of(draft, settings=settings, loss=loss).numerator, list(draft.parameters()))
    numerator = terms_of(draft, settings=settings, loss=loss).numerator
    slots, weights_M, found = seen[-1]
    term, hits = selector_oracle(draft, slots, weights_M, missing_label)
    label_M = slots.ids_BNL[..., 1:][slots.valid_BNP]
    nll_M = F.cross_entropy(slots.hidden_MD @ slots.head_VD.T, label_M, reduction="none")
    want = (weights_M * nll_M).sum() + 0.7 * term
    assert found.term.item() == pytest.approx(0.7 * term.item(), rel=1e-5) and found.hit_M.tolist() == hits
    assert numerator.item() == pytest.approx(want.item(), rel=1e-5)
    assert 0 < found.counts["candidates_found"] < len(hits) and 0 < sum(hits) < len(hits)
    theirs = torch.autograd.grad(want, list(draft.parameters()))
    for (name, _), one, other in zip(draft.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("missing_label", ["skip", "insert"])
def test_a_smaller_vocabulary_gives_the_terms_of_a_head_of_its_rows(missing_label: str) -> None:
    draft, settings = dflash2_draft(), own(missing_label=missing_label)
    everything = torch.arange(50)
    whole, same = terms_of(draft, settings=settings), terms_of(draft, vocab_ids=everything, settings=settings)
    assert whole.numerator.item() == pytest.approx(same.numerator.item(), rel=1e-6)
    few = terms_of(draft, vocab_ids=torch.arange(5, 30), settings=settings)
    assert few.extra["candidates_found"] >= whole.extra["candidates_found"]
    few.numerator.backward()
    assert draft.candidate_selector.successor_codebook.grad[30:].abs().sum() == 0
    assert draft.candidate_selector.successor_codebook.grad[5:30].abs().sum() > 0


@pytest.mark.parametrize("loss", ["decay", "dpace"])
def test_sums_do_not_depend_on_the_split(loss: str) -> None:
    draft = dflash2_draft()
    whole = terms_of(draft, loss=loss)
    parts = [terms_of(draft, rows, loss=loss) for rows in ((2,), (0, 3), (1,))]
    assert whole.numerator.item() == pytest.approx(sum(part.numerator.item() for part in parts), rel=1e-5)
    assert whole.run_sum == sum(part.run_sum for part in parts)
    assert whole.extra.keys() == draft.counts.keys()
    for name, size in draft.counts.items():
        values = torch.as_tensor(whole.extra[name]).reshape(-1)
        assert len(values) == size
        assert values.tolist() == sum(torch.as_tensor(part.extra[name]) for part in parts).reshape(-1).tolist()


def test_every_parameter_learns_within_two_steps_of_a_new_draft() -> None:
    draft = DFlash2Draft(dflash2_config())
    draft.reset_parameters(0)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2, weight_decay=0)
    before = {name: parameter.clone() for name, parameter in draft.named_parameters()}
    for _ in range(3):
        terms_of(draft).numerator.backward()
        assert all(parameter.grad is not None for parameter in draft.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert [name for name, parameter in draft.named_parameters() if torch.equal(parameter, before[name])] == []


def test_figures_with_and_without_the_selector_are_both_reported() -> None:
    draft = dflash2_draft()
    sums = {"count": [4, 4, 2], "blocks": [4], "candidates_found": [8], "base_correct": [2, 1, 0], "base_run_sum": [3]}
    assert draft.metrics(sums) == {
        "candidate_recall": 0.8,
        "base_acc": 0.3,
        "base_acc_k1": 0.5,
        "base_acc_k2": 0.25,
        "base_acc_k3": 0.0,
        "base_acceptance_length": 1.75,
    }
    nothing = {
        "count": [0, 0, 0],
        "blocks": [0],
        "candidates_found": [0],
        "base_correct": [0, 0, 0],
        "base_run_sum": [0],
    }
    assert draft.metrics(nothing) == {}


def test_flops_count_the_added_products() -> None:
    draft, plain = dflash2_draft(), tiny_draft()
    work = dict(context_tokens=10, blocks=2, visible_tokens=7, predictions=6, vocab=50)
    added = 6 * (2 * 4 * 2 * 2 * 32 * 32 + 6 * 6 * (32 + 5))
    assert draft.train_flops(**work) == plain.train_flops(**work) + added
