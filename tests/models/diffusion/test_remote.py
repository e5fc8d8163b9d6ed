"""Models with code of their own: small checkpoints whose code has the signature of the published ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm.config.params import Target
from dllm.decoding.causal import decode_causally, decode_seeded, speculate_on_itself
from dllm.decoding.own_generate import generate_with_own_code
from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import sample
from dllm.errors import ConfigError, ModelError
from dllm.models import target_identity, targets
from dllm.models.diffusion.families import load_checkpoint, load_diffusion_lm
from tests.models.diffusion.remote_code import CODES, OLDER_PARADIGMS, PARADIGMS, checkpoint, without_code
from tests.models.small_models import small_model

PROMPTS = [[21, 22, 23, 24, 25], [40, 41]]
WISH = Settings(max_new_tokens=6, block_size=4)
IDS = torch.tensor([[21, 22, 23, 24, 25, 26, 27, 28], [31, 32, 33, 34, 35, 0, 0, 0], [41, 42, 43, 44, 45, 0, 0, 0]])
VALID = torch.arange(8) < torch.tensor([[8], [5], [5]])


def test_llada_decodes_ragged_batches_though_its_code_ignores_padding(tmp_path: Path) -> None:
    target = checkpoint(tmp_path, "llada")
    model = load_diffusion_lm(target)
    model.eos_ids = set()
    assert model.config.context == "full"
    together = sample(model, PROMPTS, WISH)
    assert [answer for prompt in PROMPTS for answer in sample(model, [prompt], WISH)] == together
    plain = without_code(target, "llada")
    plain.eos_ids = set()
    assert [a.token_ids for a in sample(plain, PROMPTS, WISH)] == [a.token_ids for a in together]
    with pytest.raises(ModelError, match="no cache"):
        sample(model, PROMPTS, Settings(max_new_tokens=6, cache="dual"))
    with pytest.raises(ConfigError, match="brings no generation code"):
        generate_with_own_code(plain, PROMPTS, WISH)


def test_llada_rows_of_equal_length_go_together_and_see_no_padding(tmp_path: Path) -> None:
    target = checkpoint(tmp_path, "llada")
    model = load_diffusion_lm(target)
    calls = []
    model.model.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[0].shape)))
    found = model.hidden(IDS, VALID)
    assert sorted(calls) == [(1, 8), (2, 5)]
    plain = without_code(target, "llada")
    torch.testing.assert_close(found[VALID], plain.hidden(IDS, VALID)[VALID], atol=1e-4, rtol=1e-4)


def test_llada2_is_block_causal_through_additive_masks_and_has_its_own_generate(tmp_path: Path) -> None:
    model = load_diffusion_lm(checkpoint(tmp_path, "llada2_moe"))
    model.eos_ids = set()
    assert model.config.context == "block" and model.prompt_blocks
    moved = IDS[:1].clone()
    moved[0, -1] = 99
    blocks = torch.arange(8) // 4
    allowed = (blocks[None] <= blocks[:, None])[None]
    difference = model.hidden(IDS[:1], allowed_BSS=allowed) - model.hidden(moved, allowed_BSS=allowed)
    difference = difference.abs().amax(-1)[0]
    assert (difference[:4] == 0).all() and (difference[4:] > 0).all()
    torch.testing.assert_close(model.causal_hidden(IDS), small_model().causal_hidden(IDS), atol=1e-4, rtol=1e-4)
    together = sample(model, PROMPTS, WISH)
    assert [answer for prompt in PROMPTS for answer in sample(model, [prompt], WISH)] == together
    assert [a.token_ids for a in generate_with_own_code(model, PROMPTS, WISH)] == [[9] * 6] * 2


def test_nemotron_generates_by_its_own_code(tmp_path: Path) -> None:
    model = load_diffusion_lm(checkpoint(tmp_path, "nemotron_labs_diffusion"))
    model.eos_ids = set()
    (answer,) = generate_with_own_code(model, PROMPTS[:1], WISH)
    assert answer.token_ids == [9] * 6
    assert answer.passes == 5
    wish = Settings(max_new_tokens=6, block_size=4)
    own = [generate_with_own_code(model, PROMPTS, wish, name) for name in ("ar_generate", "linear_spec_generate")]
    assert own[0] != own[1] and [a.token_ids for a in own[0]] == [a.token_ids for a in own[1]]
    with pytest.raises(ModelError, match="sampler own"):
        model.hidden(torch.tensor(PROMPTS[:1]))
    with pytest.raises(ModelError, match="bidirectional, not for training"):
        model.paired(IDS, VALID, VALID)


@pytest.mark.parametrize("decode", [decode_causally, speculate_on_itself, decode_seeded])
def test_our_samplers_decode_nemotron_as_any_other_model(tmp_path: Path, decode) -> None:
    model, plain = load_diffusion_lm(checkpoint(tmp_path, "nemotron_labs_diffusion")), small_model()
    plain.mask_token_id = model.mask_token_id
    model.eos_ids = plain.eos_ids = set()
    found = decode(model, PROMPTS, WISH)
    assert found == decode(plain, PROMPTS, WISH)
    own = generate_with_own_code(model, PROMPTS, WISH, "ar_generate")
    assert decode is decode_seeded or [a.token_ids for a in own] == [a.token_ids for a in found]
    with pytest.raises(ModelError, match="set up for training"):
        decode(load_diffusion_lm(checkpoint(tmp_path, "nemotron_labs_diffusion")).for_likelihood(4), PROMPTS, WISH)


def test_nemotron_is_built_for_training_by_the_name_that_its_code_has(tmp_path: Path) -> None:
    target = checkpoint(tmp_path, "nemotron_labs_diffusion")
    assert load_diffusion_lm(target).for_likelihood(4).model.config.dlm_paradigm == "block_diff"
    layout = tmp_path / "layout.py"
    layout.write_text(layout.read_text().replace(PARADIGMS, OLDER_PARADIGMS))
    assert load_diffusion_lm(target).for_likelihood(4).model.config.dlm_paradigm == "sbd_block_diff"


def test_nemotron_lays_out_noisy_beside_clean_text_whatever_the_batch(tmp_path: Path) -> None:
    model = load_diffusion_lm(checkpoint(tmp_path, "nemotron_labs_diffusion")).for_likelihood(4)
    masked = VALID & (torch.arange(8) > 2)
    noisy, clean = model.paired(IDS, VALID, masked)
    alone = [model.paired(IDS[i : i + 1, :n], VALID[i : i + 1, :n], masked[i : i + 1, :n]) for i, n in ((1, 5), (2, 5))]
    torch.testing.assert_close(noisy[1:, :5], torch.cat([pair[0] for pair in alone]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(clean[VALID], small_model().causal_hidden(IDS, VALID)[VALID], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.causal_hidden(IDS, VALID)[VALID], clean[VALID], atol=1e-4, rtol=1e-4)
    moved = IDS.clone()
    moved[0, 5] = 99  # masked, and in the last block: nothing of it shows
    assert torch.equal(model.paired(moved, VALID, masked)[0][0], noisy[0])


@pytest.mark.parametrize("kind", CODES)
def test_a_saved_model_has_its_code_as_published(tmp_path: Path, kind: str) -> None:
    source, first, second = (tmp_path / name for name in ("source", "first", "second"))
    target = checkpoint(source, kind)
    load_diffusion_lm(target).for_likelihood(4).save(first)
    load_checkpoint(first, trust_remote_code=True).save(second)
    published = json.loads((source / "config.json").read_text())
    written = json.loads((second / "config.json").read_text())
    for name in ("auto_map", "dlm_paradigm", "block_size", "model_type", "mask_token_id"):
        assert written.get(name) == published.get(name), name
    assert {p.name for p in second.glob("*.py")} == {p.name for p in source.glob("*.py")}
    saved = target.model_copy(update={"model": str(second)})
    before, after = load_diffusion_lm(target).state_dict(), load_diffusion_lm(saved).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_code_runs_only_where_the_target_allows_it_and_from_the_hub_at_a_commit_only(tmp_path: Path) -> None:
    target = checkpoint(tmp_path, "llada2_moe")
    with pytest.raises(ModelError):
        load_diffusion_lm(target.model_copy(update={"trust_remote_code": False}))
    for revision in (None, "main", "abc123"):
        with pytest.raises(ConfigError, match="pinned commit"):
            targets.locate(Target(model="some/model", revision=revision, trust_remote_code=True))


@pytest.mark.parametrize("kind", CODES)
def test_a_published_model_has_one_mask_token(tmp_path: Path, kind: str) -> None:
    target = checkpoint(tmp_path, kind)
    own = load_diffusion_lm(target).mask_token_id
    with pytest.raises(ConfigError, match=f"mask id 500, and {kind} was trained with {own}"):
        load_diffusion_lm(target, mask_token_id=500)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "mask_token_id": None}))
    with pytest.raises(ConfigError, match=f"mask id {own}, and {kind} was trained with (126336|156895|100)"):
        load_diffusion_lm(target)


@pytest.mark.parametrize("kind", ["llada", "llada2_moe"])
def test_code_for_transformers_4_loads(tmp_path: Path, kind: str) -> None:
    target, name = checkpoint(tmp_path, kind), {"llada": "model.transformer.ff_out.weight"}.get(kind, "lm_head.weight")
    for _ in range(2):  # adjusting it again changes nothing
        model = targets.load_target(target, device="cpu")
        head = load_file(tmp_path / "model.safetensors")[name]
        assert torch.equal(model.get_output_embeddings().weight, head)
        if kind == "llada2_moe":
            expected = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
            torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)


def test_other_code_is_another_model(tmp_path: Path) -> None:
    target = checkpoint(tmp_path, "llada")
    before = target_identity.identity(target)
    (tmp_path / "modeling.py").write_text(CODES["llada"] + "# changed\n")
    after = target_identity.identity(target)
    assert before["code"] != after["code"] and before["weights"] == after["weights"]
    assert "code" not in target_identity.identity(target.model_copy(update={"trust_remote_code": False}))


def test_code_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    target = checkpoint(tmp_path, "llada")
    code = tmp_path / "modeling.py"
    code.write_text("from transformers.utils import long_gone\n" + code.read_text())
    with pytest.raises(ModelError, match="own code fails with transformers") as caught:
        targets.load_target(target)
    assert "\n" not in str(caught.value)


def test_both_forms_of_nemotron_share_their_weights_and_a_form_that_cannot_be_built_is_one_line(tmp_path: Path) -> None:
    model = load_diffusion_lm(checkpoint(tmp_path, "nemotron_labs_diffusion"))
    scorer = model.for_likelihood(4)
    own = dict(model.named_parameters())
    assert all(parameter.data_ptr() == own[name].data_ptr() for name, parameter in scorer.named_parameters())
    assert scorer.config.block_size == 4 and model.config.block_size == 32
    (tmp_path / "layout.py").write_text((tmp_path / "layout.py").read_text() + "\n# sbd_block_diff\n")
    with pytest.raises(ModelError, match=r"cannot be built for training.*sbd_block_diff") as caught:
        model.for_likelihood(4)
    assert "\n" not in str(caught.value)
