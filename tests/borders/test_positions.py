"""The positions of a target are counted by one rule, in all that reads it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dllm.config.params import Target
from dllm.decoding.speculative import Decoder
from dllm.lm_eval.models import CausalScores
from dllm.models import targets
from dllm.models.diffusion.families import load_diffusion_lm
from dllm.models.positions import max_positions, positions_in
from tests.borders.test_target_configs import _copy_of_tiny


def test_positions_end_where_the_length_of_one_row_would_change_another() -> None:
    long = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [4.0]}
    of = {"max_position_embeddings": 131072}
    assert positions_in({**of, "rope_scaling": long, "original_max_position_embeddings": 4096}) == 4096
    assert positions_in({**of, "rope_scaling": {"type": "su", "original_max_position_embeddings": 9}}) == 9
    assert positions_in({**of, "rope_parameters": {**long, "original_max_position_embeddings": 8192}}) == 8192
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    for section in ("rope_scaling", "rope_parameters"):
        assert positions_in({"max_position_embeddings": 40960, section: yarn}) == 131072
    assert positions_in({**of, "rope_scaling": None}) == 131072
    assert positions_in({"n_positions": 512}) == 512 and positions_in({}) is None


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
            "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048}


@pytest.mark.parametrize(("rope", "positions"), [(LONGROPE, 128), (YARN, 8192), ({"rope_theta": 1e4}, 2048)])
def test_all_who_read_a_target_take_the_same_positions(tmp_path: Path, rope: dict[str, Any], positions: int) -> None:
    target = Target(model=str(_copy_of_tiny(tmp_path / "m", rope_parameters=rope)), dtype="float32")
    model, tokenizer = targets.load_target(target, device="cpu"), targets.load_tokenizer(target)
    assert max_positions(target) == Decoder(model).limit == positions
    scores = CausalScores(model, tokenizer)
    assert scores.max_length == scores.max_scored_length - 1 == positions
    assert load_diffusion_lm(target, mask_token_id=3).max_length == positions


def test_a_longrope_target_is_used_up_to_its_first_length(tmp_path: Path) -> None:
    folder = _copy_of_tiny(tmp_path / "m", rope_parameters=LONGROPE)
    target = Target(model=str(folder), dtype="float32")
    model = targets.load_target(target, device="cpu")
    assert max_positions(target) == 128 == Decoder(model).limit
    rows = torch.arange(2 * 100).view(2, 100) % 1000 + 5
    with torch.no_grad():
        alone, beside = model(rows[:1]).logits, model(rows).logits[:1]
        beyond = model(rows[:1], position_ids=torch.arange(100)[None] + 29).logits
        plain = model(rows[:1], position_ids=torch.arange(100)[None] + 28).logits
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, plain, rtol=1e-3, atol=1e-3)  # positions are relative, up to the first length
    assert not torch.allclose(alone, beyond, atol=1e-2), "and beyond it all positions are others"
