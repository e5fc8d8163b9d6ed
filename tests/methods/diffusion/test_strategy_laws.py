"""Laws of a diffusion step beyond its sums: where gradients go, what normalisers share, and an exact resumption."""

import json
import math
import os
import signal
from array import array
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dllm.config.params import Train
from dllm.methods.diffusion.masked import MaskedStrategy
from dllm.methods.diffusion.noise import Noise
from dllm.tracking.runs import NullTracker
from dllm.training.batches import Example
from dllm.training.distributed import Ranks
from dllm.training.loop import Loop
from tests.methods.diffusion.strategies import strategy_of
from tests.models.small_models import small_model

CLOCKED = {"time", "mem", "tokens_per_s", "masked_tokens_per_s", "mfu"}
LENGTHS = [(11, 3), (16, 4), (9, 2), (13, 6)]
"""Of each row: its tokens, and how many of them are the prompt."""
ROWS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 6)).map(lambda n: (n[0] + n[1], n[1])), min_size=2, max_size=4
)
SEEDS, EPOCHS = st.integers(0, 2**20), st.integers(0, 50)
BLOCKS = {"attention": "block", "block_size": 4}
KINDS = [
    ("mdlm", {}),
    ("mdlm", {"complementary": True}),
    ("mdlm", {"at_least_one": False, "time_sampling": "independent"}),
    ("mdlm", BLOCKS),
    ("hybrid", {"corruption": "exact_count", "block_size": 4}),
]
QUICK = examples(max_examples=15)


def rows(prefix: str, eos: int | None = None, lengths=LENGTHS) -> list[Example]:
    found = []
    for number, (length, prompt) in enumerate(lengths):
        ids = torch.randint(10, 400, (length,), generator=torch.Generator().manual_seed(number)).tolist()
        found.append(Example(f"{prefix}{number}-0", array("i", [*ids[:-1], eos or ids[-1]]), prompt))
    return found


def settings(mode: str = "mdlm", section: dict | None = None, **changes) -> Train:
    return Train.model_validate({"mode": mode, "compute_dtype": "float32", mode: section or {}, **changes})


def strategy(asked: Train, mixin: type = object, eos: int | None = None, lengths=LENGTHS) -> MaskedStrategy:
    model = small_model().requires_grad_(True)
    model.eos_ids = {eos} if eos else set()
    splits = {"train": rows("t", eos, lengths), "heldout": rows("h", eos)[:2]}
    return strategy_of(model, splits, asked, mixin)


def supervised(lengths) -> list[int]:
    return [length - prompt for length, prompt in lengths]


@QUICK
@given(ROWS, SEEDS, EPOCHS, st.sampled_from([{}, BLOCKS]))
def test_positions_that_are_not_masked_get_no_gradient(lengths, seed, epoch, section) -> None:
    """Law: the diffusion loss has zero gradient at the outputs of unmasked positions, and some at all others."""
    made, outputs = strategy(settings(section=section, seed=seed), lengths=lengths), []
    made.model.model.base_model.norm.register_forward_hook(lambda module, given, found: outputs.append(found))
    every = list(range(len(lengths)))
    batch = made.corrupt("train", every, epoch)
    terms = made.terms("train", every, epoch)
    (gradient,) = torch.autograd.grad(terms.numerator, outputs)
    masked = batch.views[0][0]
    assert (gradient != 0).any(-1).sum() == masked.sum() > 0
    if not section:
        assert torch.equal((gradient != 0).any(-1), masked)


@pytest.mark.parametrize(
    ("mode", "section"), [("mdlm", {}), ("mdlm", BLOCKS), ("hybrid", {}), ("hybrid", BLOCKS)], ids=str
)
def test_without_a_masked_token_the_diffusion_loss_is_0(mode, section) -> None:
    """Law: no mask: the loss is exactly 0, or the next-token loss alone, and every gradient is finite."""
    made = strategy(settings(mode, section))
    made._draw = lambda *given: [Noise(torch.zeros_like(given[-1]), torch.ones(len(given[-1])))]  # type: ignore[method-assign]
    terms = made.terms("train", [0, 1, 2], 0)
    ahead = terms.counts["ar_nll"] if mode == "hybrid" else torch.zeros(1)
    assert terms.numerator.item() == pytest.approx(float(ahead), rel=1e-6, abs=0)
    assert (float(ahead) > 0) == (mode == "hybrid")
    assert terms.counts["masked"].sum() == 0
    terms.numerator.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.model.parameters())
    assert made.model.head_VD.grad is not None


@QUICK
@given(ROWS, SEEDS, EPOCHS, st.sampled_from(KINDS))
def test_the_clean_text_and_the_prompt_stay_as_they_are(lengths, seed, epoch, kind) -> None:
    """Law: masks lie among the response's tokens; ids and labels are not touched, nor are prompts and padding."""
    made = strategy(settings(*kind, seed=seed), lengths=lengths)
    batch = made.corrupt("train", range(len(lengths)), epoch)
    for number, (length, prompt) in enumerate(lengths):
        assert batch.ids_BS[number, :length].tolist() == list(made.splits["train"][number].input_ids)
        assert batch.maskable_BS[number].nonzero()[:, 0].tolist() == list(range(prompt, length))
        for masked, prob in batch.views:
            assert not masked[number, :prompt].any() and not masked[number, length:].any()
            assert (prob[number, :prompt] == 1).all() and (prob[number, length:] == 1).all()


@QUICK
@given(ROWS, SEEDS, EPOCHS, st.sampled_from(KINDS), st.data())
def test_a_rows_masks_are_its_own_whatever_the_batch(lengths, seed, epoch, kind, data) -> None:
    """Law: the same seed, epoch and row give the same masks in any split into batches, and in a process that resumes
    there; the global random state is not touched."""
    made, again = (strategy(settings(*kind, seed=seed), lengths=lengths) for _ in range(2))
    order = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(1, len(lengths)))
    state = torch.get_rng_state()
    made.corrupt("train", order, epoch + 1)  # what was drawn before does not matter
    whole = made.corrupt("train", range(len(lengths)), epoch)
    for part in (order[:cut], order[cut:]):
        if not part:
            continue
        found = again.corrupt("train", part, epoch)
        for (masked, prob), (own_masked, own_prob) in zip(whole.views, found.views, strict=True):
            width = own_masked.shape[1]
            assert torch.equal(masked[part, :width], own_masked) and not masked[part, width:].any()
            assert torch.equal(prob[part, :width], own_prob)
    assert torch.equal(torch.get_rng_state(), state)


@QUICK
@given(ROWS, SEEDS, EPOCHS, st.booleans())
def test_a_pair_scores_each_token_of_a_response_once(lengths, seed, epoch, blocky) -> None:
    """Law: complementary masks: as many predictions as supervised tokens, and each position is masked in one view."""
    made = strategy(settings(section={"complementary": True, **(BLOCKS if blocky else {})}, seed=seed), lengths=lengths)
    every = list(range(len(lengths)))
    batch = made.corrupt("train", every, epoch)
    (one, _), (other, _) = batch.views
    assert torch.equal(one ^ other, batch.maskable_BS)
    with torch.no_grad():
        terms = made.terms("train", every, epoch)
    assert terms.predictions == terms.counts["masked"].sum() == sum(supervised(lengths))
    assert terms.counts["supervised"] == 2 * terms.predictions


@pytest.mark.parametrize("complementary", [False, True])
def test_probabilities_are_uniform_from_eps(complementary) -> None:
    """Law: p = (1 - eps) t + eps lies in [eps, 1] and has mean (1 + eps) / 2; in pairs in [eps, 1 - eps], mean 1/2."""
    eps, epochs = 0.2, 200
    section = {"eps": eps, "at_least_one": False, "time_sampling": "independent", "complementary": complementary}
    made, found = strategy(settings(section=section)), []
    for epoch in range(epochs):
        batch = made.corrupt("train", [0, 1, 2, 3], epoch)
        found.append(torch.stack([prob[:, 8] for _, prob in batch.views]))  # an answer place of every row
    chance_VN = torch.cat(found, 1).double()
    highest = 1 - eps if complementary else 1
    assert eps - 1e-6 <= chance_VN.min() < eps + 0.02 and highest - 0.02 < chance_VN.max() <= highest + 1e-6
    error = (highest - eps) / math.sqrt(12 * 4 * epochs)
    for view_N in chance_VN:
        assert abs(float(view_N.mean()) - (highest + eps) / 2) < 4 * error


@QUICK
@given(ROWS, SEEDS, EPOCHS)
def test_normalisers_share_out_one_sum(lengths, seed, epoch) -> None:
    """Law: by token and by batch divide one numerator, by all supervised tokens and by rows; by sequence each row's,
    which is by token where all rows have as many."""
    every = list(range(len(lengths)))

    def terms(normaliser, chosen=every, rows=lengths):
        made = strategy(settings(section={"normaliser": normaliser}, seed=seed), lengths=rows)
        with torch.no_grad():
            return made.terms("train", chosen, epoch)

    found = {name: terms(name) for name in ("token", "batch", "sequence")}
    alone = [terms("token", [row]) for row in every]
    assert [own.denominator for own in alone] == supervised(lengths)
    assert found["token"].denominator == sum(supervised(lengths))
    assert found["batch"].denominator == found["sequence"].denominator == len(lengths)
    torch.testing.assert_close(found["batch"].numerator, found["token"].numerator)
    own = sum(one.numerator / one.denominator for one in alone)
    torch.testing.assert_close(found["sequence"].numerator, own, rtol=1e-4, atol=1e-5)
    alike = [lengths[0]] * len(lengths)
    by_token, by_sequence = (terms(name, rows=alike) for name in ("token", "sequence"))
    one, other = (float(found.numerator) / found.denominator for found in (by_token, by_sequence))
    assert one == pytest.approx(other, rel=1e-4)


@QUICK
@given(ROWS, SEEDS, EPOCHS, st.integers(2, 9))
def test_an_end_token_more_counts_in_its_own_row_alone(lengths, seed, epoch, multiple) -> None:
    """Law: padding one response by its end token adds to its supervised tokens, and other rows' terms stay."""
    plain, filled = (
        strategy(settings(section={"normaliser": "sequence", "eos_padding": m}, seed=seed), eos=7, lengths=lengths)
        for m in (0, multiple)
    )
    every = list(range(len(lengths)))
    with torch.no_grad():
        before, after = ([made.terms("train", [row], epoch) for row in every] for made in (plain, filled))
        whole = filled.terms("train", every, epoch)
    for number, answer in enumerate(supervised(lengths)):
        grown = -answer % multiple
        assert after[number].counts["supervised"] == before[number].counts["supervised"] + grown
        assert (after[number].numerator == before[number].numerator) == (grown == 0)
    assert whole.counts["supervised"] == sum(answer + -answer % multiple for answer in supervised(lengths))
    torch.testing.assert_close(whole.numerator, sum(own.numerator for own in after), rtol=1e-4, atol=1e-5)


@QUICK
@given(ROWS, SEEDS, EPOCHS, st.floats(0, 2), st.sampled_from([{}, BLOCKS]))
def test_the_joint_loss_is_next_token_prediction_and_a_share_of_diffusion(lengths, seed, epoch, alpha, section) -> None:
    """Law: alpha = 0 leaves the next-token loss, the shifted cross-entropy of a causal pass on x_0."""
    every, found = list(range(len(lengths))), {}
    for share in (0.0, alpha):
        made = strategy(settings("hybrid", {"ar_loss_alpha": share, **section}, seed=seed), lengths=lengths)
        with torch.no_grad():
            found[share] = made.terms("train", every, epoch)
    ahead = 0.0
    for example in made.splits["train"]:
        ids = torch.tensor([list(example.input_ids)])
        with torch.no_grad():
            logits = made.model.logits(made.model.causal_hidden(ids))[0, :-1]
        ahead += float(F.cross_entropy(logits, ids[0, 1:], reduction="none")[example.prompt_length - 1 :].sum())
    assert float(found[0.0].numerator) == pytest.approx(ahead, rel=1e-4)
    whole = ahead + alpha * float(found[alpha].counts["weighted"])
    assert float(found[alpha].numerator) == pytest.approx(whole, rel=1e-4)


class Killed:
    """Receives a signal in the middle of its third step."""

    calls = 0

    def terms(self, split, rows, epoch):
        self.calls += split == "train"
        if self.calls == 5 and split == "train":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().terms(split, rows, epoch)


def trained(work: Path, asked: Train, mixin: type = object) -> Path:
    alone = Ranks(0, 1, torch.device("cpu"))
    return Loop(strategy(asked, mixin), asked, alone, work=work, tracker=NullTracker()).run().checkpoint


def journal(work: Path) -> list[dict]:
    records = [json.loads(line) for line in (work / "training.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in CLOCKED} for record in records]


@pytest.mark.parametrize(
    ("mode", "section"),
    [
        ("mdlm", {"complementary": True}),
        ("hybrid", {"attention": "block", "block_size": 4, "corruption": "exact_count"}),
    ],
)
def test_a_killed_run_goes_on_with_the_same_masks(tmp_path: Path, mode, section) -> None:
    """Law: resumed training is uninterrupted training, bitwise, masks included."""
    shape = {"epochs": 3, "batch_size": 1, "grad_accumulation": 2, "log_every": 1, "validate_every": 4}
    asked = settings(mode, section, **shape)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    best = trained(straight, asked)
    with pytest.raises(SystemExit):
        trained(killed, asked, Killed)
    assert (killed / "checkpoints" / "latest").read_text() == "step-000003\n"
    assert trained(killed, asked).name == best.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = Path("checkpoints", "step-000006", name)
        assert (killed / last).read_bytes() == (straight / last).read_bytes()
    assert journal(killed) == journal(straight)
