"""No stage multiplies in bfloat16 on a CPU that would emulate it: an optimizer of torch's did, for most of a step."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm.config import recipe_book
from dllm.config.load import parse_params
from dllm.models import precision
from dllm.stages import evaluate, prepare, regenerate, train
from tests.stages import test_diffusion

PRODUCT = re.compile(r"mm|linear|attention|conv|dot|mv")


class Products(TorchDispatchMode):
    """Notes the operators that multiply matrices in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.in_bfloat16: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_bfloat16 = (isinstance(each, torch.Tensor) and each.dtype is torch.bfloat16 for each in tree_leaves(args))
        if PRODUCT.search(str(func)) and any(of_bfloat16):
            self.in_bfloat16.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["with instructions", "without"])
def has_instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, mlflow_store: str) -> bool:
    """A CPU that multiplies in bfloat16, or one that does not."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    monkeypatch.setattr(precision, "_multiplies_in", lambda dtype: request.param)
    return bool(request.param)


def test_a_draft(tmp_path: Path, has_instructions: bool) -> None:
    raw = yaml.safe_load(recipe_book.text("tiny-dflash2"))
    raw["target"]["dtype"] = raw["train"]["compute_dtype"] = "bfloat16"
    raw["prepare"] = {"sources": [{"name": "gsm8k", "limit": 12}], "heldout_fraction": 0.5}
    raw["train"] |= {"epochs": 1, "validate_every": 2}
    raw["evaluate"] |= {"num_prompts": 1, "identity_prompts": 0, "max_new_tokens": 8}
    assert raw["train"]["optimizer"]["name"] == "muon"
    params = parse_params(raw)
    for stage in (prepare, regenerate, train, evaluate):
        with Products() as products:
            stage.run(params, tmp_path)
        expected = has_instructions and stage is not prepare
        assert bool(products.in_bfloat16) == expected, (stage.__name__, products.in_bfloat16)


def test_a_diffusion_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_store: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    monkeypatch.setattr(precision, "_multiplies_in", lambda dtype: False)
    given = {"regenerate.engine": "dataset", "regenerate.turns": "last", "regenerate.max_new_tokens": 256}
    changes = {**given, "target.dtype": "bfloat16", "train.compute_dtype": "bfloat16", "train.epochs": 0.2}
    params = test_diffusion.params(tmp_path, "tiny-mdlm", **changes)
    assert params.train.optimizer.name == "muon"
    for stage in (prepare, regenerate, train):
        with Products() as products:
            stage.run(params, tmp_path)
        assert not products.in_bfloat16, stage.__name__
