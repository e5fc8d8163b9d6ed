"""Causal models with the mask lifted, of each family, and their checkpoints."""

import json
from pathlib import Path

import pytest
import torch

from dllm.config.params import Target
from dllm.errors import ConfigError
from dllm.models.diffusion.cache import CanvasCache
from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.families import load_checkpoint, load_diffusion_lm
from dllm.models.targets import load_tokenizer
from tests.models.small_models import FAMILIES, TINY, small_model


@pytest.mark.parametrize(("family", "window"), FAMILIES)
def test_hidden_attends_to_everything_and_causal_hidden_causally(family: str, window: int | None) -> None:
    model = small_model(family, window)
    ids = torch.randint(0, 500, (2, 7))
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 500
    with torch.no_grad():
        moved = (model.hidden(ids) - model.hidden(changed)).abs().amax(-1)
        assert (moved > 1e-6).all()
        moved = (model.causal_hidden(ids) - model.causal_hidden(changed)).abs().amax(-1)
        assert (moved[:, :-1] == 0).all()
        assert (moved[:, -1] > 0).all()


@pytest.mark.parametrize(("family", "window"), FAMILIES)
def test_causal_hidden_gives_transformers_own_logits(family: str, window: int | None, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = small_model(family, window)
    model.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 500, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model.causal_hidden(ids)), plain(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "window"), FAMILIES)
def test_padding_on_either_side_changes_nothing(family: str, window: int | None, side: str) -> None:
    model = small_model(family, window)
    ids, pad = torch.randint(0, 500, (1, 6)), torch.full((1, 3), 3)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    valid = torch.tensor([[False] * 3 + [True] * 6 if side == "left" else [True] * 6 + [False] * 3])
    part = slice(3, None) if side == "left" else slice(None, 6)
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(padded, valid)[:, part], model.hidden(ids), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            model.causal_hidden(padded, valid)[:, part], model.causal_hidden(ids), atol=1e-4, rtol=1e-4
        )


def test_an_allowed_mask_restricts_attention() -> None:
    model = small_model("Llama")
    ids = torch.randint(0, 500, (2, 8))
    causal = torch.ones(8, 8, dtype=torch.bool).tril().expand(2, -1, -1)
    with torch.no_grad():
        found = model.hidden(ids, allowed_BSS=causal)
        torch.testing.assert_close(found, model.causal_hidden(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "window"), FAMILIES)
def test_columns_over_a_fresh_cache_equal_the_whole_pass(family: str, window: int | None) -> None:
    model = small_model(family, window)
    ids = torch.randint(0, 500, (2, 10))
    positions = torch.arange(10).expand(2, -1)
    cache = CanvasCache(positions)
    seen = torch.ones(2, 10, 10, dtype=torch.bool)
    with torch.no_grad():
        whole = model.hidden(ids)
        torch.testing.assert_close(model.cached_hidden(ids, positions, seen, cache), whole, atol=1e-4, rtol=1e-4)
        again = model.cached_hidden(ids[:, 4:7], positions[:, 4:7], seen[:, 4:7], cache.next_pass(4, 7))
    torch.testing.assert_close(again, whole[:, 4:7], atol=1e-4, rtol=1e-4)


def test_the_mask_token_is_added_to_a_tokenizer_without_one_and_saved() -> None:
    model = load_diffusion_lm(TINY)
    assert model.tokenizer.mask_token_id == model.mask_token_id
    assert model.mask_token_id < model.head_VD.shape[0]
    assert model.mask_token_id not in model.eos_ids


def test_saved_and_read_back_it_is_the_same_model(tmp_path) -> None:
    model = load_diffusion_lm(TINY)
    model.config = DiffusionConfig("mdlm", model.mask_token_id, 8)
    model.save(tmp_path)
    again = load_checkpoint(tmp_path)
    assert again.config == DiffusionConfig("mdlm", model.mask_token_id, 8)
    assert again.mask_token_id == model.mask_token_id
    assert "is_causal" not in json.loads((tmp_path / "config.json").read_text())
    ids = torch.arange(20, 30)[None]
    assert torch.equal(model.hidden(ids), again.hidden(ids))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "window"), FAMILIES)
def test_each_family_is_saved_and_read_back_bidirectional(
    family: str, window: int | None, tied: bool, tmp_path: Path
) -> None:
    model = small_model(family, window, tied=tied)
    assert (model.head_VD is model.model.get_input_embeddings().weight) == tied
    model.config = DiffusionConfig("mdlm", model.mask_token_id)
    model.save(tmp_path)
    again = load_checkpoint(tmp_path)
    assert (again.head_VD is again.model.get_input_embeddings().weight) == tied
    ids = torch.randint(0, 500, (2, 7))  # longer than any window, and as far as two layers of it reach
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 500
    with torch.no_grad():
        assert torch.equal(again.logits(again.hidden(ids)), model.logits(model.hidden(ids)))
        assert ((again.hidden(ids) - again.hidden(changed)).abs().amax(-1) > 0).all()


@pytest.mark.parametrize(("family", "window"), FAMILIES)
def test_gradients_reach_every_weight_of_each_family(family: str, window: int | None) -> None:
    model = small_model(family, window, tied=True).requires_grad_(True)
    model.logits(model.hidden(torch.randint(0, 500, (2, 9)))).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_an_embedding_without_a_spare_row_grows_by_one(tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(TINY)
    size = len(tokenizer)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=size, tie_word_embeddings=True, **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_diffusion_lm(Target(model=str(tmp_path), dtype="float32"))
    assert model.mask_token_id == size
    assert model.head_VD.shape[0] == model.model.get_input_embeddings().weight.shape[0] == size + 1


@pytest.mark.parametrize(("id", "message"), [(10**6, "outside"), (2, "frames")])
def test_an_invalid_mask_id_is_refused(id: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_diffusion_lm(TINY, mask_token_id=id)
