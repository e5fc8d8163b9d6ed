"""The rotary embedding that SGLang lacks without a GPU, against transformers' own and against rotating by hand."""

import importlib.util

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dllm.engines.sglang import CPU_MODULES

spec = importlib.util.spec_from_file_location("rotary", CPU_MODULES / "vllm" / "_custom_ops.py")
assert spec and spec.loader
rotary = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rotary)

TOKENS, HEADS, KEY_HEADS, WIDTH = 7, 4, 2, 16


def angles(width: int) -> torch.Tensor:
    return torch.arange(40.0)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_turns_as_transformers_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 40, (TOKENS,), generator=generator)
    query, key = (torch.randn(TOKENS, heads * WIDTH, generator=generator).to(dtype) for heads in (HEADS, KEY_HEADS))
    by_position = angles(WIDTH)
    whole = torch.cat([by_position, by_position], -1)[positions]
    expected = apply_rotary_pos_emb(
        query.view(1, TOKENS, HEADS, WIDTH).float(),
        key.view(1, TOKENS, KEY_HEADS, WIDTH).float(),
        whole.cos()[None],
        whole.sin()[None],
        unsqueeze_dim=2,
    )
    cache = torch.cat([by_position.cos(), by_position.sin()], -1)
    rotary.rotary_embedding(positions, query, key, WIDTH, cache, True)
    for turned, right in zip((query, key), expected, strict=True):
        torch.testing.assert_close(
            turned.float(), right.flatten(2)[0], atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2
        )


@pytest.mark.parametrize("is_neox", [False, True])
def test_pairs_turn_by_their_angle_and_the_rest_of_a_head_stays(is_neox: bool) -> None:
    part = WIDTH // 2
    query = torch.randn(TOKENS, HEADS * WIDTH, generator=torch.Generator().manual_seed(1))
    before = query.clone().view(TOKENS, HEADS, WIDTH)
    positions = torch.arange(TOKENS)
    cache = torch.cat([angles(part).cos(), angles(part).sin()], -1)
    rotary.rotary_embedding(positions, query, None, WIDTH, cache, is_neox)
    after = query.view(TOKENS, HEADS, WIDTH)
    assert torch.equal(after[..., part:], before[..., part:])
    for pair in range(part // 2):
        one, two = (pair, pair + part // 2) if is_neox else (2 * pair, 2 * pair + 1)
        turn = torch.polar(torch.ones(TOKENS), angles(part)[:TOKENS, pair])[:, None]
        right = torch.complex(before[..., one], before[..., two]) * turn
        torch.testing.assert_close(torch.complex(after[..., one], after[..., two]), right)
