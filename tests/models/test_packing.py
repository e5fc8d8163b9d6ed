"""Packed weights: the same products, and no trace afterwards."""

import pytest
import torch
from torch import nn

from dllm.models.packing import packed_linears


def test_products_agree_and_the_module_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.SiLU(), nn.Linear(96, 32)).bfloat16()
    x = torch.randn(5, 3, 64).bfloat16()
    with torch.inference_mode():
        plain = model(x)
        with packed_linears(model):
            packed = model(x)
        torch.testing.assert_close(packed.float(), plain.float(), atol=2e-2, rtol=2e-2)
        assert torch.equal(model(x), plain)


def test_products_of_float32_agree_to_its_own_rounding():
    torch.manual_seed(0)
    model, x = nn.Linear(64, 96), torch.randn(5, 64)
    with torch.inference_mode():
        plain = model(x)
        with packed_linears(model):
            torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(x), plain)


def test_an_input_of_another_dtype_is_refused_as_without_packing():
    model, x = nn.Linear(8, 8), torch.randn(2, 8).bfloat16()
    with torch.inference_mode(), packed_linears(model), pytest.raises(RuntimeError, match="dtype"):
        model(x)
