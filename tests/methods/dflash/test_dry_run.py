"""The dry run: an export that would not load, or not as it was trained, is found before the first step."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm.errors import ModelError
from dllm.methods.dflash.dry_run import check_export, dry_run
from dllm.methods.dflash.settings import Draft
from dllm.models.drafts.checkpoint import save_draft
from dllm.models.drafts.config import DFlashConfig
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.targets import empty_target
from dllm.registry import DRAFTS
from tests.models.small_models import TINY


def made(name: str = "dflash", **more: Any) -> Any:
    target: Any = empty_target(TINY).config
    settings = Draft(architecture=name, num_hidden_layers=2, num_target_layers_tapped=3, **more)
    draft = DRAFTS[name](DRAFTS[name].config_for(target, settings, block_size=4, mask_token_id=3))
    draft.reset_parameters(seed=0)
    return draft


@pytest.mark.parametrize("name", list(DRAFTS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_family_passes_and_leaves_nothing(
    name: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = made(name)
    before = {key: tensor.clone() for key, tensor in draft.state_dict().items()}
    dry_run(draft, dtype, tmp_path / "dry-run")
    assert list(tmp_path.iterdir()) == []
    assert all(tensor.equal(before[key]) for key, tensor in draft.state_dict().items())
    assert ("LMDeploy 0.18 has no DFlash2DraftModel" in capsys.readouterr().err) == (name == "dflash2")


def test_engines_that_cannot_decode_it_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(made(sliding_window=8, causal=False), torch.bfloat16, tmp_path / "dry-run")
    (line,) = capsys.readouterr().err.splitlines()
    able, *others = line.split("; not ")
    assert able == "train: engines that decode it as trained: sglang, vllm, llamacpp, z-lab"
    assert [other.split(": ")[0] for other in others] == ["lmdeploy", "trtllm"]
    assert others[0].startswith("lmdeploy: LMDeploy") and others[1].startswith("trtllm: TensorRT-LLM")


@dataclass(frozen=True, kw_only=True)
class _Forgetful(DFlashConfig):
    def to_json(self) -> dict[str, Any]:
        raw = super().to_json()
        return raw | {"layer_types": ["full_attention"] * self.num_hidden_layers, "is_causal": None}


def test_a_config_that_is_read_otherwise_is_refused(tmp_path: Path) -> None:
    draft = made(sliding_window=8)
    draft.config = _Forgetful(**{field.name: getattr(draft.config, field.name) for field in fields(draft.config)})
    with pytest.raises(ModelError, match=r"would not be what was trained: .* is .*, and read as"):
        dry_run(draft, torch.bfloat16, tmp_path / "dry-run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda state: state.pop("norm.weight"), "norm.weight is in one of"),
        (lambda state: state.update({"norm.weight": state["norm.weight"].half()}), "expected torch.bfloat16"),
        (lambda state: state["norm.weight"].mul_(2), "norm.weight has other values"),
    ],
)
def test_tensors_that_are_read_otherwise_are_named(damage: Any, said: str, tmp_path: Path) -> None:
    draft: DFlashDraft = made()
    save_draft(draft, tmp_path, torch.bfloat16)
    check_export(draft, torch.bfloat16, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=said):
        check_export(draft, torch.bfloat16, tmp_path)
