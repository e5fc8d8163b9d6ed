"""A model's own generation code: what reaches it, what is refused, and whose random numbers it draws."""

import io
from pathlib import Path

import pytest
import torch

from dllm.decoding.diffusion import GenerateOptions, generate
from dllm.decoding.own_generate import generate_with_own_code
from dllm.decoding.settings import Settings
from dllm.errors import ConfigError, ModelError
from dllm.models.diffusion.families import load_diffusion_lm
from dllm.models.diffusion.protocol import DiffusionLM
from tests.models.diffusion.remote_code import checkpoint

SIZE = {"max_new_tokens": 6, "block_size": 4}


def generated(model: DiffusionLM, sampler="own", show=None, **named) -> list[dict]:
    size = {**SIZE, "block_size": None} if sampler in ("ar", "own-ar") else SIZE
    options = GenerateOptions(sampler, settings={**size, **named})
    return list(generate(model, ["Why?", "How?"], options, show))


@pytest.fixture
def llada2(tmp_path: Path) -> DiffusionLM:
    return load_diffusion_lm(checkpoint(tmp_path, "llada2_moe"))


@pytest.fixture
def nemotron(tmp_path: Path) -> DiffusionLM:
    return load_diffusion_lm(checkpoint(tmp_path, "nemotron_labs_diffusion", every_word=True))


def test_a_record_says_that_the_models_own_code_wrote(llada2, nemotron) -> None:
    for model, sampler, passes in ((llada2, "own", 0), (nemotron, None, 5)):
        for record in generated(model, sampler):
            assert record["sampler"] == "own" and record["token_ids"] == [9] * 6
            assert record["passes"] == passes
            assert record["tokens_per_pass"] == (6 / passes if passes else None)


def test_what_own_code_cannot_do_is_refused(llada2, nemotron) -> None:
    for model, named, flag in [
        (llada2, {"factor": 1.0}, "--factor"),
        (llada2, {"remasking": "random", "cfg_scale": 2.0}, "--remasking, --cfg-scale"),
        (nemotron, {"top_p": 0.9, "temperature": 1.0}, "--top-p"),
    ]:
        with pytest.raises(ConfigError, match=f"sampler own has no use for {flag};"):
            generated(model, **named)
    with pytest.raises(ConfigError, match="own generate has no use for cfg_scale"):
        generate_with_own_code(nemotron, [[21, 22]], Settings(max_new_tokens=4, block_size=4, cfg_scale=2))
    with pytest.raises(ConfigError, match="divides steps among 2 blocks, which do not divide 3"):
        generate_with_own_code(nemotron, [[21, 22]], Settings(max_new_tokens=6, block_size=4, steps=3))
    with pytest.raises(ConfigError, match="sampler own does not report its steps"):
        generated(llada2, show=io.StringIO())
    for sampler in ("llada", "llada2"):
        with pytest.raises(ConfigError, match="cannot set this model's masks"):
            generated(nemotron, sampler)


@pytest.mark.parametrize("new", [1, 96, 300])
def test_any_length_fits_code_that_writes_whole_blocks(nemotron, new) -> None:
    for steps in (None, -(-new // 32)):
        (record,) = generate(
            nemotron, ["Why?"], GenerateOptions(settings={"max_new_tokens": new, "block_size": 32, "steps": steps})
        )
        assert record["sampler"] == "own" and record["tokens"] == new
    (record,) = generate(nemotron, ["Why?"], GenerateOptions("own-ar", settings={"max_new_tokens": 6}))
    assert record["passes"] == 6, "word by word there are no blocks to fill"


def test_own_code_that_fails_is_one_line(nemotron, monkeypatch) -> None:
    def fail(prompt_ids, block_length=32, threshold=None):
        raise AssertionError("not like this")

    monkeypatch.setattr(nemotron.model, "generate", fail)
    with pytest.raises(ModelError, match=r"own fail fails \(AssertionError: not like this\).*another --sampler"):
        generated(nemotron, None)


def test_only_nemotrons_blocks_are_decoded_by_its_own_code_by_default(nemotron, llada2) -> None:
    for sampler, by in [(None, "own"), *((name, name) for name in ("nemotron", "self-spec", "own-self-spec", "ar"))]:
        assert [record["sampler"] for record in generated(nemotron, sampler)] == [by, by]
    assert llada2.default_sampler == "llada"
    ids = [[r["token_ids"] for r in generated(nemotron, sampler)] for sampler in ("ar", "own-ar")]
    assert ids[0] == ids[1]


def test_own_code_draws_from_our_seed_and_leaves_the_global_state(llada2, monkeypatch) -> None:
    def generate(self, inputs, temperature=0.0, block_length=32, gen_length=6):
        return torch.randint(10, 400, (1, gen_length))

    monkeypatch.setattr(type(llada2.model), "generate", generate)
    state = torch.get_rng_state()
    one, again, other = (generated(llada2, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    ids = [[record["token_ids"] for record in records] for records in (one, again, other)]
    assert ids[0] == ids[1] and ids[0] != ids[2]
    assert ids[0][0] != ids[0][1], "each prompt has numbers of its own"
