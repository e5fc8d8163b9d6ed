"""The dtype that a device computes in, and what keeps the recipe's dtype all the same."""

import platform
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm.config.params import Target
from dllm.methods.dflash.features import FeatureCache
from dllm.models import precision
from dllm.models.targets import load_target

TINY = Target(model="builtin:tiny", dtype="bfloat16")


@pytest.fixture(params=[True, False], ids=["with instructions", "without"])
def has_instructions(request, monkeypatch):
    monkeypatch.setattr(precision, "_multiplies_in", lambda dtype: request.param)
    return request.param


def test_a_cpu_without_instructions_computes_in_float32_and_says_so(has_instructions):
    expected = torch.bfloat16 if has_instructions else torch.float32
    assert precision.compute_dtype("bfloat16", "cpu") is expected
    assert load_target(TINY, device="cpu").dtype is expected
    assert (precision.note("bfloat16", "cpu") is None) == has_instructions
    assert precision.note(torch.float32, "cpu") is None


def test_gpus_and_explicit_dtypes_are_obeyed(has_instructions):
    assert precision.compute_dtype("bfloat16", "cuda") is torch.bfloat16
    assert precision.compute_dtype("float64", "cpu") is torch.float64
    assert load_target(TINY, torch.bfloat16, "cpu").dtype is torch.bfloat16


def test_features_are_stored_in_the_dtype_of_the_recipe(has_instructions, tmp_path):
    cache = FeatureCache(tmp_path / "cache", [[1, 2, 3], [4, 5]], dtype=torch.bfloat16)
    cache.fill(0, load_target(TINY, device="cpu"), [0, 1])
    (part,) = (tmp_path / "cache").glob("part-*.safetensors")
    assert load_file(part)["features"].dtype is torch.bfloat16


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="the flags of an x86 on Linux")
def test_this_cpu_is_asked():
    (flags, *_) = re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert precision._multiplies_in(torch.bfloat16) == bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))
