"""A saved draft is what published drafts look like, and comes back as it was (conformance 15, 17, 34)."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm.config.params import Target
from dllm.errors import ModelError
from dllm.models import targets
from dllm.models.drafts import checkpoint as export
from dllm.models.drafts.config import DFlashConfig
from dllm.models.drafts.dflash import DFlashDraft
from tests.decoding import stand_in_drafts

QWEN3_8B = DFlashConfig(
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=5,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40960,
    block_size=16,
    mask_token_id=151669,
    target_layer_ids=(1, 9, 17, 25, 33),
    num_target_layers=36,
)


@pytest.fixture(scope="module")
def model():
    return targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")


@pytest.fixture
def draft(model) -> DFlashDraft:
    draft = DFlashDraft(stand_in_drafts.config(model, 4))
    draft.reset_parameters(seed=1)
    return draft


def hidden(draft: DFlashDraft) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    embeds_BLD = torch.randn(1, 4, 64, generator=generator)
    features_BSF = torch.randn(1, 9, 192, generator=generator)
    with torch.inference_mode():
        return draft.run_block(embeds_BLD, features_BSF, 9, draft.new_cache())


def published_shapes(config: DFlashConfig) -> dict[str, tuple[int, ...]]:
    """The layout of z-lab's released checkpoints: 11 tensors per layer and 3 besides."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    besides = {"fc": (hidden, hidden * len(config.target_layer_ids)), "hidden_norm": (hidden,), "norm": (hidden,)}
    layers = {f"layers.{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in (besides | layers).items()}


def test_the_tensors_are_those_of_published_drafts() -> None:
    shapes = DFlashDraft.tensor_shapes(QWEN3_8B)
    assert shapes == published_shapes(QWEN3_8B)
    assert len(shapes) == 11 * 5 + 3
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_048_626_432


def test_listing_tensors_draws_no_random_number(draft: DFlashDraft) -> None:
    before = torch.get_rng_state()
    assert DFlashDraft.tensor_shapes(draft.config) == published_shapes(draft.config)
    assert torch.equal(before, torch.get_rng_state())
    assert {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()} == published_shapes(draft.config)


def test_what_is_saved_comes_back_bit_for_bit(draft: DFlashDraft, model, tmp_path: Path) -> None:
    export.save_draft(draft, tmp_path / "a")
    loaded = export.load_draft(tmp_path / "a", model.config)
    assert loaded.config == draft.config
    assert torch.equal(hidden(loaded), hidden(draft))
    export.save_draft(loaded, tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]


def test_a_bfloat16_export_says_so_and_loads_as_float32(draft: DFlashDraft, tmp_path: Path) -> None:
    export.save_draft(draft, tmp_path, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = export.load_draft(tmp_path)
    assert loaded.fc.weight.dtype == torch.float32
    assert torch.equal(loaded.fc.weight, draft.fc.weight.to(torch.bfloat16).float())
    assert next(draft.parameters()).dtype == torch.float32


def test_embedding_and_head_stay_with_the_target(draft: DFlashDraft, tmp_path: Path) -> None:
    export.save_draft(draft, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [name for name in stored if "embed" in name or "head" in name]
    assert not [name for name, tensor in stored.items() if draft.config.vocab_size in tensor.shape]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["block_size"] == config["dflash_config"]["block_size"] == 4
    assert config["is_causal"] is config["dflash_config"]["causal"] is False
    assert config["dflash_config"]["mask_token_id"] == 3
    assert config["dflash_config"]["target_layer_ids"] == list(draft.config.target_layer_ids)


def damage(directory: Path, change) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.0.mlp.up_proj.weight"), "lacks layers.0.mlp.up_proj.weight"),
        (lambda s: s.update({"lm_head.weight": torch.ones(2)}), "holds what no draft has: lm_head.weight"),
        (lambda s: s.update({"norm.weight": torch.ones(3)}), r"norm.weight has shape \(3,\), expected \(64,\)"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(draft, tmp_path: Path, change, message: str) -> None:
    export.save_draft(draft, tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        export.load_draft(tmp_path)


def test_extra_tensors_and_nan_are_not_saved(draft: DFlashDraft, tmp_path: Path) -> None:
    with torch.no_grad():
        draft.fc.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"not finite: fc\.weight"):
        export.save_draft(draft, tmp_path / "a")
    draft.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"holds what no draft has: extra\.bias, extra\.weight"):
        export.save_draft(draft, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_names_with_a_model_prefix_and_shards_are_read(draft: DFlashDraft, tmp_path: Path) -> None:
    export.save_draft(draft, tmp_path)
    state = {f"model.{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    names = sorted(state)
    (tmp_path / "model.safetensors").unlink()
    save_file({name: state[name] for name in names[:4]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: state[name] for name in names[4:]}, tmp_path / "model-00002-of-00002.safetensors")
    assert torch.equal(hidden(export.load_draft(tmp_path)), hidden(draft))


def test_what_is_no_draft_is_one_line(draft: DFlashDraft, model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such draft directory"):
        export.load_draft(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        export.load_draft(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read the draft's config"):
        export.load_draft(tmp_path)
    for name, said in (
        ("LlamaForCausalLM", "architecture is LlamaForCausalLM, ours: DFlashDraftModel"),
        ("Qwen3DSparkModel", "a draft of DSpark, which is not supported"),
        ("DFlash2DraftModel", "not a DFlash 2 draft: its config lacks block_size, conv_group_size"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name], "dflash_config": {}}))
        with pytest.raises(ModelError, match=said):
            export.load_draft(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot read the draft's config"):
        export.load_draft(tmp_path)
    export.save_draft(draft, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ModelError, match="cannot read weights"):
        export.load_draft(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        export.load_draft(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 128, "for another target: hidden_size 64, the target's is 128"),
        ("vocab_size", 999, "for another target: vocab_size 1408, the target's is 999"),
        ("num_hidden_layers", 4, "taps layer 5 of a target with 4"),
    ],
)
def test_a_draft_for_another_target_is_refused(draft, model, tmp_path: Path, field, value, message: str) -> None:
    import copy

    export.save_draft(draft, tmp_path)
    other = copy.deepcopy(model.config)
    setattr(other, field, value)
    with pytest.raises(ModelError, match=message):
        export.load_draft(tmp_path, other)
