"""What every draft family gets from the protocol, and where another family's parts come in."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dllm.config.params import Target
from dllm.decoding.speculative import Decoder
from dllm.errors import ModelError
from dllm.methods.dflash import objective
from dllm.methods.dflash.anchors import draw_anchors
from dllm.methods.dflash.objectives import Weighting, decay
from dllm.methods.dflash.settings import Dflash
from dllm.models import targets
from dllm.models.drafts.checkpoint import family_of
from dllm.models.drafts.config import FULL, SLIDING
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.drafts.dflash2 import DFlash2Draft
from dllm.models.drafts.loss_terms import ExtraLoss
from dllm.models.drafts.proposal import Proposal
from dllm.models.drafts.protocol import Draft, TargetIO
from tests.decoding.stand_in_drafts import ScriptedDraft, config, oracle
from tests.models.drafts.test_attention import tiny_config, tiny_draft
from tests.models.small_models import small_model

PROMPT = [1, 300, 20, 45, 301, 77]


@pytest.fixture(scope="module")
def model():
    return targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")


@pytest.mark.parametrize(
    ("raw", "family"),
    [
        (tiny_config().to_json(), DFlashDraft),
        ({"architectures": ["Qwen3DFlashDraftModel"]}, DFlashDraft),
        ({"dflash_config": {}}, DFlashDraft),
        ({"architectures": ["DFlash2DraftModel"], "dflash_config": {}}, DFlash2Draft),
        ({"architectures": ["LlamaForCausalLM"]}, None),
        ({"architectures": None}, None),
        ({}, None),
    ],
)
def test_a_family_is_found_by_its_architecture(raw: dict, family: type[Draft] | None) -> None:
    assert family_of(raw) is family


def test_a_new_draft_is_sized_by_its_settings(model) -> None:
    settings = Dflash.model_validate(
        {"block_size": 4, "draft": {"num_hidden_layers": 2, "target_layer_ids": [1, 4], "sliding_window": 9}}
    )
    found = DFlashDraft.config_for(model.config, settings.draft, block_size=4, mask_token_id=3)
    assert (found.num_hidden_layers, found.target_layer_ids, found.sliding_window) == (2, (1, 4), 9)
    assert (found.block_size, found.mask_token_id, found.hidden_size) == (4, 3, model.config.hidden_size)
    mixed = {"num_hidden_layers": 2, "sliding_window": 9, "layer_types": [SLIDING, FULL], "causal": False}
    settings = Dflash.model_validate({"block_size": 4, "draft": mixed})
    found = DFlashDraft.config_for(model.config, settings.draft, block_size=4, mask_token_id=3)
    assert [found.layer_attention(layer) for layer in (0, 1)] == [(9, False), (None, False)]


def test_a_draft_of_another_family_is_no_start(model) -> None:
    scripted = ScriptedDraft(config(model, 4), lambda position: 0, 100)
    settings = Dflash().draft
    assert ScriptedDraft.start_from(scripted, settings, 0) is scripted
    with pytest.raises(ModelError, match=r"a ScriptedDraft, and a DFlashDraftModel is trained.*draft\.init"):
        DFlashDraft.start_from(scripted, settings, 0)


class Penalised(DFlashDraft):
    """A family with a loss term of its own."""

    def extra_loss(self, slots, weights_M: Tensor, settings) -> ExtraLoss:
        block_BN = slots.ids_BNL.shape[:2]
        assert slots.ids_BNL.shape == (*block_BN, self.config.block_size)
        assert slots.valid_BNP.sum() == len(slots.hidden_MD) == len(weights_M) == len(slots.nll_M)
        assert slots.top_ids_MK.shape == (len(weights_M), 0)
        return ExtraLoss((weights_M * slots.hidden_MD.square().sum(-1)).sum())


def terms_of(draft: Draft, loss: str = "decay") -> objective.StepSums:
    generator = torch.Generator().manual_seed(0)
    ids, supervised = torch.randint(49, (2, 24), generator=generator), torch.ones(2, 24, dtype=torch.bool)
    batch = objective.Batch(ids, supervised, torch.randn(2, 24, 64, generator=generator))
    anchors = draw_anchors(supervised, num_blocks=3, block_size=4, sampling="without_replacement", seeds=[1, 2])
    table = torch.randn(50, 32, generator=generator)
    return objective.dflash_terms(draft, table, table, batch, anchors, gamma=2.0, loss=loss)


def test_a_familys_own_loss_term_is_added_to_the_numerator() -> None:
    plain, penalised = tiny_draft(), Penalised(tiny_config())
    penalised.load_state_dict(plain.state_dict())
    one, other = terms_of(plain), terms_of(penalised)
    assert other.numerator.item() > one.numerator.item() + 1 and other.denominator == one.denominator
    other.numerator.backward()
    assert all(parameter.grad is not None for parameter in penalised.parameters())


def test_an_objectives_own_term_is_added_to_the_numerator(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_term(slots, gamma: float) -> Weighting:
        assert torch.equal(slots.loss_M, slots.nll_M) and slots.teacher_MD is None and slots.vocab_ids is None
        return replace(decay(slots, gamma), term=torch.tensor(100.0))

    expected = terms_of(tiny_draft())
    monkeypatch.setattr(objective, "OBJECTIVES", {"mine": with_term})
    assert terms_of(tiny_draft(), "mine").numerator.item() == pytest.approx(expected.numerator.item() + 100)


def test_flops_grow_with_blocks_and_predictions(model) -> None:
    class Sized(ScriptedDraft):
        def __init__(self) -> None:
            super().__init__(config(model, 4), lambda position: 0, 100)
            self.matrix = torch.nn.Parameter(torch.zeros(3, 5))

    counted = Sized().train_flops(context_tokens=9, blocks=2, visible_tokens=7, predictions=6, vocab=10)
    assert counted == 2 * (3 * 2 * 4 * 15 + 2 * 6 * 10 * model.config.hidden_size)


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_decoding_embeds_tokens_as_training_does(family: str) -> None:
    model = small_model(family).model
    ids, weight = torch.tensor([[3, 7]]), model.get_input_embeddings().weight
    found = TargetIO.of(model)
    assert torch.equal(found.embed(ids)[0], weight[ids[0]])
    assert found.embed.weight.data_ptr() == weight.data_ptr() and found.head is model.get_output_embeddings()
    assert (model.get_input_embeddings()(ids) == weight[ids]).all() == (family == "Llama")


def test_a_draft_may_propose_fewer_tokens_than_it_could(model) -> None:
    plain = Decoder(model).generate(PROMPT, max_new_tokens=20)
    draft = oracle(model, PROMPT, plain.token_ids, 6)
    full = draft.propose

    def short(anchor_id, num_tokens, *rest) -> Proposal:
        return Proposal(full(anchor_id, num_tokens, *rest).ids_P[:2])

    draft.propose = short
    found = Decoder(model, draft).generate(PROMPT, max_new_tokens=19)
    assert found.token_ids == plain.token_ids[:19]
    assert [r.counts for r in found.rounds] == [(3, 2, 2)] * 6
