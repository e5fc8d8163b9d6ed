"""Laws of a diffusion step beyond its sums: where gradients go, what normalisers share, and an exact resumption."""

import json
import os
import signal
from array import array
from pathlib import Path

import pytest
import torch

from dllm import config
from dllm.data.collate import Example
from dllm.diffusion.strategy import DiffusionStrategy
from dllm.tracking import NullTracker
from dllm.training.distribution import Ranks
from dllm.training.loop import Loop
from tests.models.small_models import small_model

CLOCKED = {"time", "mem", "tokens_per_s", "masked_tokens_per_s", "mfu"}
LENGTHS = [(11, 3), (16, 4), (9, 2), (13, 6)]


def rows(prefix: str, eos: int | None = None) -> list[Example]:
    found = []
    for number, (length, prompt) in enumerate(LENGTHS):
        ids = torch.randint(10, 400, (length,), generator=torch.Generator().manual_seed(number)).tolist()
        found.append(Example(f"{prefix}{number}-0", array("i", [*ids[:-1], eos or ids[-1]]), prompt))
    return found


def settings(mode: str = "mdlm", section: dict | None = None, **changes) -> config.Train:
    return config.Train.model_validate({"mode": mode, "compute_dtype": "float32", mode: section or {}, **changes})


def strategy(asked: config.Train, kind=DiffusionStrategy, eos: int | None = None) -> DiffusionStrategy:
    model = small_model().requires_grad_(True)
    model.eos_ids = {eos} if eos else set()
    splits = {"train": rows("t", eos), "heldout": rows("h", eos)[:2]}
    return kind(model, splits, asked)


@pytest.mark.parametrize("section", [{}, {"attention": "block", "block_size": 4}], ids=["full", "block"])
def test_places_that_are_not_masked_get_no_gradient(section) -> None:
    """Law: the diffusion loss has zero gradient at the outputs of unmasked places; with no mask at all it is 0."""
    made, outputs = strategy(settings(section=section)), []
    made.model.model.base_model.norm.register_forward_hook(lambda module, given, found: outputs.append(found))
    outputs.clear()
    batch = made.corrupt("train", [0, 1], 0)
    terms = made.terms("train", [0, 1], 0)
    (gradient,) = torch.autograd.grad(terms.numerator, outputs)
    masked = batch.views[0][0]
    assert (gradient != 0).any(-1).sum() == masked.sum()
    if not section:
        assert torch.equal((gradient != 0).any(-1), masked)


@pytest.mark.parametrize("kind", [{}, {"complementary": True}, {"attention": "block", "block_size": 4}], ids=str)
def test_the_clean_text_and_the_prompt_stay_as_they_are(kind) -> None:
    """Law: masks lie among the answer's tokens; ids and labels are not touched, nor are prompts and padding."""
    made = strategy(settings(section=kind))
    for epoch in range(5):
        batch = made.corrupt("train", [0, 1, 2, 3], epoch)
        for number, (length, prompt) in enumerate(LENGTHS):
            assert batch.ids_BS[number, :length].tolist() == list(made.splits["train"][number].input_ids)
            for masked, prob in batch.views:
                assert not masked[number, :prompt].any() and not masked[number, length:].any()
                assert (prob[number, :prompt] == 1).all() and (prob[number, length:] == 1).all()


def test_normalisers_share_out_one_sum() -> None:
    """Law: by token and by batch divide one numerator, by all supervised tokens and by rows; by sequence each row's."""
    asked = {name: strategy(settings(section={"normaliser": name})) for name in ("token", "batch", "sequence")}
    with torch.no_grad():
        found = {name: made.terms("train", [0, 1, 2, 3], 0) for name, made in asked.items()}
        alone = [asked["token"].terms("train", [row], 0) for row in range(4)]
    supervised = [length - prompt for length, prompt in LENGTHS]
    assert [terms.denominator for terms in alone] == supervised
    assert found["token"].denominator == sum(supervised)
    assert found["batch"].denominator == found["sequence"].denominator == 4
    torch.testing.assert_close(found["batch"].numerator, found["token"].numerator)
    own = sum(terms.numerator / terms.denominator for terms in alone)
    torch.testing.assert_close(found["sequence"].numerator, own, rtol=1e-4, atol=1e-5)


def test_an_end_token_more_counts_in_its_own_row_alone() -> None:
    """Law: padding one answer by its end token adds to its supervised tokens, and other rows' terms stay."""
    plain, filled = (
        strategy(settings(section={"normaliser": "sequence", "eos_padding": multiple}), eos=7) for multiple in (0, 8)
    )
    answers = [length - prompt for length, prompt in LENGTHS]  # 8, 12, 7, 7
    with torch.no_grad():
        before, after = ([made.terms("train", [row], 0) for row in range(4)] for made in (plain, filled))
    for number, answer in enumerate(answers):
        grown = -answer % 8
        assert after[number].counts["supervised"] == before[number].counts["supervised"] + grown
        assert (after[number].numerator == before[number].numerator) == (grown == 0)


class Killed(DiffusionStrategy):
    """Receives a signal in the middle of its third step."""

    calls = 0

    def terms(self, split, rows, epoch):
        self.calls += split == "train"
        if self.calls == 5 and split == "train":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().terms(split, rows, epoch)


def trained(work: Path, asked: config.Train, kind=DiffusionStrategy) -> Path:
    alone = Ranks(0, 1, torch.device("cpu"))
    return Loop(strategy(asked, kind), asked, alone, work=work, tracker=NullTracker()).run().checkpoint


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
