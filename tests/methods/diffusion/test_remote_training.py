"""Published models in training: their own code gives the losses of ours, and their gradients flow."""

import shutil
from array import array
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dllm.config.params import Target, Train
from dllm.errors import ConfigError
from dllm.methods.diffusion import likelihood
from dllm.methods.diffusion.build import initial_model
from dllm.methods.diffusion.masked import MaskedStrategy
from dllm.models.diffusion.families import load_diffusion_lm
from dllm.training.batches import Example
from tests.methods.diffusion.strategies import strategy_of
from tests.models.diffusion.remote_code import checkpoint, without_code
from tests.models.small_models import small_model


def row(id: str, length: int, prompt: int) -> Example:
    ids = torch.randint(10, 400, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Example(id, array("i", ids), prompt)


LENGTHS = ((9, 3), (14, 6), (14, 5), (11, 2))
SPLITS = {"train": [row(f"t{i}-0", *of) for i, of in enumerate(LENGTHS)], "heldout": [row("h-0", 12, 4)]}
BLOCKS = {"attention": "block", "block_size": 4}
WAYS = {
    "llada": {"mode": "mdlm"},
    "llada2_moe": {"mode": "mdlm", "mdlm": BLOCKS},
    "nemotron_labs_diffusion": {"mode": "hybrid", "hybrid": BLOCKS},
}


def train(kind: str, **changes) -> Train:
    return Train.model_validate({"compute_dtype": "float32", **WAYS[kind], **changes})


@pytest.fixture(params=WAYS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def target(tmp_path: Path, kind: str) -> Target:
    return checkpoint(tmp_path / "published", kind)


@pytest.fixture
def strategy(target: Target, kind: str) -> MaskedStrategy:
    return strategy_of(initial_model(target, train(kind), "cpu"), SPLITS, train(kind))


def test_sums_do_not_depend_on_the_batch_split(strategy: MaskedStrategy) -> None:
    with torch.no_grad():
        whole = strategy.terms("train", [0, 1, 2, 3], 1)
        parts = [strategy.terms("train", part, 1) for part in ([3, 0], [2], [1])]
    assert whole.numerator.item() == pytest.approx(sum(p.numerator.item() for p in parts), rel=1e-4)
    for name, value in whole.counts.items():
        pooled = sum(torch.as_tensor(part.counts[name]).double() for part in parts)
        torch.testing.assert_close(torch.as_tensor(value).double(), torch.as_tensor(pooled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_reach_every_weight_in_training(strategy: MaskedStrategy, dtype: torch.dtype) -> None:
    strategy.dtype = dtype
    strategy.model.train()
    strategy.terms("train", [0, 1, 2, 3], 0).numerator.backward()
    for name, parameter in strategy.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["llada", "llada2_moe"], indirect=True)
def test_the_loss_is_that_of_the_same_weights_without_own_code(
    strategy: MaskedStrategy, target: Target, kind: str
) -> None:
    plain = without_code(target, kind)
    plain.prompt_blocks = strategy.model.prompt_blocks
    ours = strategy_of(plain, SPLITS, train(kind))
    with torch.no_grad():
        for epoch in range(3):
            expected = ours.terms("train", [0, 1, 2, 3], epoch).numerator.item()
            assert strategy.terms("train", [0, 1, 2, 3], epoch).numerator.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["nemotron_labs_diffusion"], indirect=True)
def test_nemotrons_terms_are_of_its_own_layout(strategy: MaskedStrategy) -> None:
    """Blocks count from the row's first column; what ends a row's last block is masked, as when it is written."""
    model, example = strategy.model, SPLITS["train"][1]
    batch = strategy.corrupt("train", [1], 0)
    assert batch.block_BS[0].tolist() == [-1] * 4 + [0] * 4 + [1] * 4 + [2] * 2
    masked, prob = batch.views[0]
    plain, ids = small_model(), torch.tensor([[*example.input_ids, 0, 0]])
    noisy = ids.masked_fill(F.pad(masked, (0, 2), value=True), model.mask_token_id)
    block = torch.arange(16) // 4
    same, before = block[:, None] == block[None], block[None] < block[:, None]
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    allowed = torch.cat([torch.cat([same, before], 1), torch.cat([torch.zeros_like(same), causal], 1)])[None]
    places = torch.arange(16).repeat(2)[None]
    with torch.no_grad():
        hidden = plain.hidden(torch.cat([noisy, ids], 1), allowed_BSS=allowed, position_ids_BS=places)
        logits = plain.logits(hidden)
        terms = strategy.terms("train", [1], 0)
    ce = F.cross_entropy(logits[0, :14], ids[0, :14], reduction="none")
    ahead = F.cross_entropy(logits[0, 16:29], ids[0, 1:14], reduction="none")[example.prompt_length - 1 :]
    assert float(terms.counts["ar_nll"].sum()) == pytest.approx(ahead.sum().item(), rel=1e-4)
    assert float(terms.counts["weighted"].sum()) == pytest.approx((ce / prob[0])[masked[0]].sum().item(), rel=1e-4)


def test_likelihood_is_bounded_through_own_code(strategy: MaskedStrategy, kind: str) -> None:
    model, examples = strategy.model.eval(), SPLITS["train"]
    one = likelihood.bound(model, examples, samples=2, batch_size=8, seed=0).figures()
    other = likelihood.bound(model, examples, samples=2, batch_size=3, seed=0).figures()
    assert one["nelbo"] == pytest.approx(other["nelbo"], rel=1e-4) and one["nelbo"] > 0
    if kind != "llada":
        expected = likelihood.causal_nll(small_model(), examples, batch_size=4)
        assert likelihood.causal_nll(model, examples, batch_size=4) == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_comes_back_and_is_published_with_its_code(
    strategy: MaskedStrategy, tmp_path: Path, kind: str
) -> None:
    step, export = tmp_path / "step", tmp_path / "export"
    strategy.save(step)
    before = {name: value.clone() for name, value in strategy.model.state_dict().items()}
    with torch.no_grad():
        for parameter in strategy.model.parameters():
            parameter.add_(1.0)
    strategy.load(step)
    assert all(torch.equal(before[name], value) for name, value in strategy.model.state_dict().items())
    strategy.export(step, export, torch.bfloat16)
    shutil.rmtree(tmp_path / "published")
    again = load_diffusion_lm(Target(model=str(export), dtype="float32", trust_remote_code=True))
    assert again.config == strategy.model.config
    name = "model.model.transformer.ff_out.weight" if kind == "llada" else "model.lm_head.weight"
    assert torch.equal(again.head_VD, before[name].bfloat16().float())


@pytest.mark.parametrize("kind", ["llada2_moe", "nemotron_labs_diffusion"], indirect=True)
def test_end_tokens_fill_the_row_where_blocks_are_counted_from_its_start(strategy: MaskedStrategy, kind: str) -> None:
    end = min(strategy.model.eos_ids)
    ended = Example("e", array("i", [20, 21, 22, 23, 24, 25, 26, 27, end]), 3)
    name = strategy.settings.mode
    section = Train.model_validate({**WAYS[kind], name: {**BLOCKS, "eos_padding": 4}})
    filled = strategy_of(strategy.model, {"train": [ended], "heldout": []}, section)
    assert len(filled.splits["train"][0]) == 12


REFUSED = [
    ("llada", {"mode": "hybrid"}, "takes no attention mask"),
    ("llada", {"mode": "mdlm", "mdlm": BLOCKS}, "takes no attention mask"),
    ("nemotron_labs_diffusion", {"mode": "mdlm"}, "train it with mode hybrid and attention block"),
    ("nemotron_labs_diffusion", {"mode": "hybrid"}, "train it with mode hybrid and attention block"),
]


@pytest.mark.parametrize(("kind", "way", "said"), REFUSED, ids=str)
def test_what_own_code_cannot_do_is_refused_at_once(tmp_path: Path, kind: str, way: dict, said: str) -> None:
    target = checkpoint(tmp_path, kind)
    (tmp_path / "model.safetensors").unlink()  # before any weight is read
    with pytest.raises(ConfigError, match=said):
        initial_model(target, Train.model_validate(way), "cpu")
