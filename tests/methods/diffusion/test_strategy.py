"""Masked diffusion as a strategy: sums no batch split changes, and the losses of the papers."""

from array import array

import pytest
import torch
import torch.nn.functional as F

from dllm.config.params import Target, Train
from dllm.methods.diffusion.build import initial_model
from dllm.methods.diffusion.masked import MaskedStrategy, padded_with_eos
from dllm.methods.diffusion.settings import Mdlm
from dllm.training.batches import Example
from tests.methods.diffusion.strategies import strategy_of

TARGET = Target(model="builtin:tiny", dtype="float32")


def row(id: str, length: int, prompt: int, seed: int) -> Example:
    ids = torch.randint(10, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(id, array("i", ids), prompt)


SPLITS = {
    "train": [row(f"t{i}-0", 12 + 5 * i, 3 + i, i) for i in range(4)],
    "heldout": [row(f"h{i}-0", 10 + 3 * i, 4, 50 + i) for i in range(2)],
}
KINDS = {
    "mdlm": {"mode": "mdlm"},
    "plain": {"mode": "mdlm", "mdlm": {"at_least_one": False, "time_sampling": "independent"}},
    "sequence": {"mode": "mdlm", "mdlm": {"normaliser": "sequence"}},
    "pairs": {"mode": "mdlm", "mdlm": {"complementary": True, "normaliser": "batch"}},
    "blocks": {"mode": "mdlm", "mdlm": {"attention": "block", "block_size": 4}},
    "hybrid": {"mode": "hybrid"},
    "hybrid blocks": {"mode": "hybrid", "hybrid": {"attention": "block", "block_size": 4}},
    "exact counts": {"mode": "hybrid", "hybrid": {"corruption": "exact_count", "block_size": 4}},
}


@pytest.fixture(scope="module")
def model():
    return initial_model(TARGET, Train(mode="mdlm"), "cpu")


def strategy(model, kind: str, **changes) -> MaskedStrategy:
    settings = Train.model_validate({"compute_dtype": "float32", **KINDS[kind], **changes})
    return strategy_of(model, SPLITS, settings)


def sums(parts) -> dict[str, list[float]]:
    found = {
        n: [sum(float(torch.as_tensor(getattr(p, n)).detach()) for p in parts)] for n in ("numerator", "denominator")
    }
    for name in parts[0].counts:
        found[name] = sum(torch.as_tensor(p.counts[name]).double().reshape(-1) for p in parts).tolist()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_sums_do_not_depend_on_the_batch_split(model, kind) -> None:
    made = strategy(model, kind)
    with torch.no_grad():
        whole = sums([made.terms("train", [0, 1, 2, 3], 1)])
        split = sums([made.terms("train", part, 1) for part in ([3, 0], [2], [1])])
    for name, values in whole.items():
        assert values == pytest.approx(split[name], rel=1e-4), name


@pytest.mark.parametrize("kind", ["mdlm", "blocks", "exact counts"])
def test_noise_is_the_rows_own_whatever_the_batch(model, kind) -> None:
    made = strategy(model, kind)
    state = torch.get_rng_state()
    whole, alone = made.corrupt("train", [0, 1, 2, 3], 2), made.corrupt("train", [1], 2)
    assert torch.equal(torch.get_rng_state(), state)
    width = len(SPLITS["train"][1])
    for (masked, prob), (own_masked, own_prob) in zip(whole.views, alone.views, strict=True):
        assert torch.equal(masked[1, :width], own_masked[0]) and not masked[1, width:].any()
        assert torch.equal(prob[1, :width], own_prob[0])
    assert not torch.equal(alone.views[0][0], made.corrupt("train", [1], 3).views[0][0])
    other = strategy(model, kind, seed=1).corrupt("train", [0, 1, 2, 3], 2)
    assert not torch.equal(whole.views[0][0], other.views[0][0])


def test_the_loss_is_cross_entropy_over_probability_at_masked_positions_and_nowhere_else(model) -> None:
    made = strategy(model, "mdlm")
    batch = made.corrupt("train", [0, 2], 0)
    masked, prob = batch.views[0]
    assert not (masked & ~batch.maskable_BS).any()
    noisy = batch.ids_BS.masked_fill(masked, model.mask_token_id)
    logits = model.logits(model.hidden(noisy, batch.valid_BS))
    ce = F.cross_entropy(logits.transpose(1, 2), batch.ids_BS, reduction="none")
    terms = made.terms("train", [0, 2], 0)
    assert terms.numerator.item() == pytest.approx((ce / prob)[masked].sum().item(), rel=1e-4)
    assert terms.denominator == int(batch.maskable_BS.sum())
    assert terms.predictions == int(masked.sum())


def test_normalisers_differ_in_nothing_but_the_share_of_rows(model) -> None:
    """Rows of equal responses: by token, by sequence and by batch are the same loss up to the response's length."""
    equal = [row(f"e{i}-0", 14, 4, 90 + i) for i in range(3)]
    found = {}
    for normaliser in ("token", "sequence", "batch"):
        section = {"mode": "mdlm", "compute_dtype": "float32", "mdlm": {"normaliser": normaliser}}
        settings = Train.model_validate(section)
        with torch.no_grad():
            terms = strategy_of(model, {"train": equal, "heldout": []}, settings).terms("train", [0, 1, 2], 0)
        found[normaliser] = terms.numerator.item() / terms.denominator
    assert found["sequence"] == pytest.approx(found["token"], rel=1e-5)
    assert found["batch"] == pytest.approx(10 * found["token"], rel=1e-5)


def test_gradients_are_plain_autograds(model) -> None:
    made = strategy(model, "hybrid blocks")
    model.zero_grad()
    made.terms("train", [0, 1], 0).numerator.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()


def test_alpha_weighs_the_diffusion_term_and_both_are_logged_unscaled(model) -> None:
    figures, totals = {}, {}
    for alpha in (0.0, 1.0):
        made = strategy(model, "hybrid", hybrid={"ar_loss_alpha": alpha})
        with torch.no_grad():
            found = sums([made.terms("train", [0, 1], 0)])
        figures[alpha], totals[alpha] = made.metrics(found), found["numerator"][0] / found["denominator"][0]
    assert figures[0.0] == figures[1.0]
    assert totals[0.0] == pytest.approx(figures[0.0]["ar_loss"], rel=1e-5)
    assert totals[1.0] - totals[0.0] == pytest.approx(figures[0.0]["diffusion_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["hybrid", "hybrid blocks"])
def test_the_autoregressive_term_is_that_of_the_causal_model(model, kind) -> None:
    made = strategy(model, kind)
    example = SPLITS["train"][2]
    ids = torch.tensor([list(example.input_ids)])
    with torch.no_grad():
        logits = model.logits(model.causal_hidden(ids))[0, :-1]
        found = sums([made.terms("train", [2], 0)])
    plain = F.cross_entropy(logits, ids[0, 1:], reduction="none")[example.prompt_length - 1 :].sum()
    assert found["ar_nll"][0] == pytest.approx(plain.item(), rel=1e-4)


def test_blocks_of_one_token_are_autoregressive_in_form(model) -> None:
    """All masked, block size 1: what is said of token i depends on clean tokens before i alone."""

    from dllm.models.diffusion.layout import blocks_of

    example = SPLITS["train"][1]
    ids = torch.tensor([list(example.input_ids)])
    masked = torch.arange(ids.shape[1])[None] >= example.prompt_length
    block = blocks_of(len(example), example.prompt_length, 1, "sequence")[None]
    changed = ids.clone()
    changed[0, example.prompt_length + 5] += 1
    with torch.no_grad():
        valid = torch.ones_like(masked)
        before, after = (model.masked_hidden(x, valid, block, masked, "block")[0] for x in (ids, changed))
    assert torch.equal(before[:6], after[:6])
    assert (before[6:] != after[6:]).any(-1).all()


def test_one_block_is_the_plain_bidirectional_pass(model) -> None:

    from dllm.models.diffusion.layout import blocks_of

    example = row("x", 12, 0, 3)
    ids = torch.tensor([list(example.input_ids)])
    masked = torch.rand(1, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    valid = torch.ones_like(masked)
    with torch.no_grad():
        block = blocks_of(len(example), example.prompt_length, 12, "sequence")[None]
        paired = model.masked_hidden(ids, valid, block, masked, "block")[0]
        plain = model.masked_hidden(ids, valid, torch.zeros_like(ids), masked, "full")[0]
    torch.testing.assert_close(paired, plain, atol=1e-4, rtol=1e-4)


def test_a_later_response_block_never_leaks_into_an_earlier_one(model) -> None:

    from dllm.models.diffusion.layout import blocks_of

    example = row("x", 16, 4, 3)
    ids = torch.tensor([list(example.input_ids)])
    masked = torch.arange(16)[None] >= 4
    valid, block = torch.ones_like(masked), blocks_of(len(example), example.prompt_length, 4, "sequence")[None]
    for begin in (4, 8, 12):
        changed = ids.clone()
        changed[0, begin:] = 7
        with torch.no_grad():
            before, after = (model.masked_hidden(x, valid, block, masked, "block")[0] for x in (ids, changed))
        assert torch.equal(before[:begin], after[:begin])  # blocks up to the changed one: 4 prompt columns earlier


def test_eos_padding_is_text_and_each_rows_own() -> None:
    ended = Example("a", array("i", [5, 6, 7, 8, 2]), 2)
    assert padded_with_eos(ended, 4, {2}, 100).input_ids.tolist() == [5, 6, 7, 8, 2, 2]
    assert padded_with_eos(ended, 4, {2}, 100, whole=True).input_ids.tolist() == [5, 6, 7, 8, 2, 2, 2, 2]
    assert padded_with_eos(ended, 4, {2}, 5) == ended
    assert padded_with_eos(ended, 3, {2}, 100) == ended
    assert padded_with_eos(ended, 0, {2}, 100) == ended
    assert padded_with_eos(ended, 4, {9}, 100) == ended, "an answer that was cut does not end"


def test_a_checkpoint_comes_back_exactly(model, tmp_path) -> None:
    made = strategy(model, "blocks")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made.save(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    made.load(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (tmp_path / "dllm.json").is_file()


def test_random_weights_have_the_targets_shape_and_the_seeds_values() -> None:
    settings = Train(mode="mdlm", mdlm=Mdlm(init="random"))
    one, two = (initial_model(TARGET, settings, "cpu").state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = initial_model(TARGET, Train(mode="mdlm"), "cpu").state_dict()
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_lower_held_out_loss_is_the_better(model) -> None:
    made = strategy(model, "mdlm")
    assert made.score({"val_loss": 1.0}) > made.score({"val_loss": 2.0})


@pytest.mark.parametrize("kind", ["mdlm", "exact counts"])
def test_a_noise_level_counts_tokens_by_their_probability(model, kind) -> None:
    made = strategy(model, kind)
    rows = range(len(SPLITS["train"]))
    with torch.no_grad():
        terms = made.terms("train", rows, 0)
    wanted = [0] * 10
    for masked_BS, prob_BS in made.corrupt("train", rows, 0).views:
        for chance in prob_BS[masked_BS].tolist():
            wanted[next(n for n in range(10) if chance <= (n + 1) / 10 + 1e-6)] += 1
    assert torch.as_tensor(terms.counts["masked"]).tolist() == wanted and sum(wanted) > 0
    one_level = [[0.0] * 10, [0.0] * 10]
    one_level[0][2], one_level[1][2] = 1.0, 4.0
    sums = {name: [1.0] for name in terms.counts} | {"correct": one_level[0], "masked": one_level[1]}
    found = made.metrics(sums)
    assert {n: v for n, v in found.items() if n.startswith("masked_acc_p")} == {"masked_acc_p30": 0.25}


def test_exact_counts_estimate_no_likelihood(model) -> None:
    """Places of a block have no equal probabilities then: what is logged is the loss, and no bound."""
    for kind in ("hybrid", "exact counts"):
        made = strategy(model, kind)
        with torch.no_grad():
            terms = made.terms("train", range(3), 0)
        found = made.metrics(
            {name: torch.as_tensor(count).reshape(-1).tolist() for name, count in terms.counts.items()}
        )
        assert ("nelbo" in found) == (kind == "hybrid") and found["diffusion_loss"] > 0


@pytest.mark.parametrize("mode", ["mdlm", "hybrid"])
def test_a_block_size_that_changes_nothing_is_refused(mode) -> None:
    with pytest.raises(ValueError, match="block_size has no effect"):
        Train.model_validate({"mode": mode, mode: {"block_size": 32}})
