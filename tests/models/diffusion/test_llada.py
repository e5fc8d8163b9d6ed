"""LLaDA read as a Llama: the logits of its own code, and what that code cannot do."""

import io
from pathlib import Path

import pytest
import torch

from dllm.cli import generation
from dllm.config.params import Target, Train
from dllm.decoding.diffusion import GenerateOptions
from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import sample
from dllm.errors import ConfigError, ModelError
from dllm.methods.diffusion.build import initial_model
from dllm.models.diffusion.families import load_checkpoint, load_diffusion_lm
from dllm.models.diffusion.protocol import DiffusionLM
from tests.models.diffusion.llada_code import published


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llada")
    published(folder)
    return folder


def read(folder: Path, own_code: bool) -> DiffusionLM:
    return load_diffusion_lm(Target(model=str(folder), dtype="float32", trust_remote_code=own_code))


@torch.no_grad()
def test_logits_are_those_of_its_own_code(folder: Path) -> None:
    by_its_code, as_llama = read(folder, True), read(folder, False)
    assert by_its_code.runs_own_code and not as_llama.runs_own_code
    assert as_llama.mask_token_id == by_its_code.mask_token_id and as_llama.config == by_its_code.config
    assert as_llama.eos_ids == by_its_code.eos_ids and as_llama.max_length == by_its_code.max_length == 256
    ids_BS = torch.randint(10, 400, (2, 37), generator=torch.Generator().manual_seed(2))
    ids_BS[0, 5:20] = as_llama.mask_token_id
    wanted, found = (model.logits(model.hidden(ids_BS)) for model in (by_its_code, as_llama))
    assert wanted.std() > 1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_responses_are_those_of_its_own_code_and_caches_speed_them_up(folder: Path) -> None:
    """Its code asserts that there is no cache; as a Llama it has Fast-dLLM's, exact at one pass per block."""
    by_its_code, as_llama = read(folder, True), read(folder, False)
    prompts, asked = [[20, 21, 22], [30, 31, 32, 33, 34]], {"max_new_tokens": 12, "block_size": 4}
    assert sample(as_llama, prompts, Settings(**asked)) == sample(by_its_code, prompts, Settings(**asked))
    a_pass_a_block = sample(as_llama, prompts, Settings(**asked, steps=3))
    for cache in ("prefix", "dual"):
        assert sample(as_llama, prompts, Settings(**asked, steps=3, cache=cache)) == a_pass_a_block
        with pytest.raises(ModelError, match="no cache of ours"):
            sample(by_its_code, prompts, Settings(**asked, cache=cache))


def test_generate_needs_no_trust_and_supports_a_cache(folder: Path, tmp_path: Path) -> None:
    options = GenerateOptions(raw=True, settings={"max_new_tokens": 8, "threshold": 0.5, "cache": "dual"})
    (record,) = generation.generate(
        checkpoint=str(folder), prompts=["Why?"], root=tmp_path, stream=io.StringIO(), options=options
    )
    assert record["tokens"] == 8 and record["sampler"] == "llada"


def test_it_is_trained_by_blocks_too_and_saved_as_a_llama(folder: Path, tmp_path: Path) -> None:
    target = Target(model=str(folder), dtype="float32")
    way = {"mode": "mdlm", "compute_dtype": "float32", "mdlm": {"attention": "block", "block_size": 4}}
    model = initial_model(target, Train.model_validate(way), "cpu")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match="takes no attention mask"):  # but not through its own code
        initial_model(target.model_copy(update={"trust_remote_code": True}), Train.model_validate(way), "cpu")
    model.save(tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved")
    assert again.model_config.model_type == "llama" and again.mask_token_id == model.mask_token_id
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["layer_norm_type", "block_type", "activation_type", "rope", "attention_layer_norm"])
def test_a_variant_that_is_no_llama_is_one_line(tmp_path: Path, name: str) -> None:
    other = {"rope": False, "attention_layer_norm": True}.get(name, "another")
    published(tmp_path, **{name: other})
    with pytest.raises(ModelError, match=f"this LLaDA is no Llama: {name} is .*--trust-remote-code"):
        read(tmp_path, False)


def test_a_missing_tensor_is_one_line(folder: Path, tmp_path: Path) -> None:
    published(tmp_path, n_layers=3)
    with pytest.raises(ModelError, match="lacks 9 tensors, model"):
        read(tmp_path, False)
