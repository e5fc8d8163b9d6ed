"""A key of a draft's config is obeyed, known to change nothing, or refused by its name; nothing is guessed."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dllm.config.params import Target
from dllm.errors import ModelError
from dllm.models import checkpoints, targets
from dllm.models.drafts import checkpoint as export
from dllm.models.drafts import serving
from dllm.models.drafts.config import FULL, SLIDING, DFlashConfig
from dllm.models.drafts.dflash import DFlashDraft
from tests.decoding import stand_in_drafts

GONE = object()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")
    draft = DFlashDraft(stand_in_drafts.config(model, 4))
    draft.reset_parameters(seed=1)
    folder = tmp_path_factory.mktemp("draft")
    export.save_draft(draft, folder)
    return folder


def _changed(saved: Path, changes: dict[str, Any]) -> dict[str, Any]:
    raw = json.loads((saved / "config.json").read_text())
    for path, value in changes.items():
        *parents, last = path.split("/")
        node = raw
        for part in parents:
            node = node.setdefault(part, {})
        if value is GONE:
            node.pop(last, None)
        else:
            node[last] = copy.deepcopy(value)
    return raw


SAME = {
    "nested block size": {"block_size": GONE},
    "block size at the top": {"dflash_config/block_size": GONE},
    "no causality": {"is_causal": GONE, "dflash_config/causal": GONE},
    "null causality": {"is_causal": None, "dflash_config/causal": None},
    "causality inside": {"is_causal": GONE, "dflash_config/causal": False},
    "causality at the top": {"is_causal": False, "dflash_config/causal": True},
    "no layer types": {"layer_types": GONE, "sliding_window": 2048, "max_window_layers": 1},
    "a window that no layer has": {"sliding_window": 2048, "use_sliding_window": True},
    "no bias": {"attention_bias": None},
    "new RoPE layout": {"rope_theta": GONE, "rope_parameters/rope_type": "default", "rope_parameters/rope_theta": 1e4},
    "explicit causality": {"is_causal": False, "dflash_config/causal": False},
    "is_causal wins": {"is_causal": False, "dflash_config/causal": None},
    "all at the top": {"dflash_config": GONE, "mask_token_id": 3, "target_layer_ids": [1, 3, 5]},
    "bookkeeping": {"_name_or_path": "x", "transformers_version": "5.0", "bos_token_id": 1, "unsloth_fixed": True},
    "switches that are off": {"use_swa": False, "final_logit_softcapping": None, "some_new_switch": None,
                              "use_mrope": False, "qkv_bias": False, "dflash_config/some_new_list": []},
    "all that transformers writes": transformers.PretrainedConfig().to_dict(),
    "all that older versions wrote": {"add_cross_attention": False, "is_decoder": False, "torchscript": False,
                                      "tie_encoder_decoder": False, "use_bfloat16": False, "tf_legacy_loss": False,
                                      "_attn_implementation_autoset": True, "_flash_attn_2_enabled": True},
    "what others write although it is so": {
        "is_neox_style": True, "rope_is_neox_style": True, "use_aux_hidden_state": True, "final_logit_softcapping": 0.0,
        "sample_from_anchor": False, "shift_label": False, "rope_scaling": {"rope_type": None}},
    "attention of SpecForge": {"dflash_config/attention_mode": "gqa"},
    "one number written otherwise": {"rope_theta": 10000},
    "RoPE of older files": {"rope_theta": GONE, "rope_scaling": {"rope_type": "default", "rope_theta": 10000}},
    "RoPE in three places": {"rope_theta": 1e4, "rope_scaling": {"rope_theta": 1e4}, "rope_parameters/rope_theta": 1e4},
}  # fmt: skip

WINDOW = {"layer_types": [SLIDING], "sliding_window": 8, "use_sliding_window": True}
MIXED = WINDOW | {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]}
UNSAID = {"is_causal": GONE, "dflash_config/causal": GONE}

OBEYED = {
    "window": (WINDOW | UNSAID, [(8, True)]),
    "window of older files": (WINDOW | UNSAID | {"use_sliding_window": GONE, "max_window_layers": 1}, [(8, True)]),
    "window that is not causal": (WINDOW | {"is_causal": False}, [(8, False)]),
    "window that is not causal, said inside": (WINDOW | UNSAID | {"dflash_config/causal": False}, [(8, False)]),
    "full and causal": ({"is_causal": True}, [(None, True)]),
    "full and causal, said inside": (UNSAID | {"dflash_config/causal": True}, [(None, True)]),
    "full and causal, against what is said inside": ({"is_causal": True, "dflash_config/causal": False},
                                                     [(None, True)]),
    "mixed": (MIXED | UNSAID, [(8, True), (None, False), (8, True)]),
    "mixed with null": (MIXED | {"is_causal": None, "dflash_config/causal": None},
                        [(8, True), (None, False), (8, True)]),
    "mixed and causal": (MIXED | {"is_causal": True}, [(8, True), (None, True), (8, True)]),
    "mixed and not causal": (MIXED | {"is_causal": False}, [(8, False), (None, False), (8, False)]),
}  # fmt: skip

LAYERS = {"num_hidden_layers": 5, "layer_types": GONE, "num_target_layers": GONE}
DFLASH_2 = {"architectures": ["DFlash2DraftModel"], "dflash_config/conv_kernel_size": 2,
            "dflash_config/conv_group_size": 16, "dflash_config/selector_rank": 8,
            "dflash_config/selector_top_k": 4}  # fmt: skip
PUBLISHED = {
    "of gpt-oss": LAYERS | {"attention_bias": True, "initial_context_length": 4096, "model_type": "gpt_oss",
                            "eos_token_id": 200002, "is_causal": GONE, "dflash_config/causal": GONE},
    "of Qwen3.5": LAYERS | {"max_window_layers": 5, "use_sliding_window": False, "use_cache": True,
                            "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "eos_token_id": 248044},
    "of Qwen3.6": LAYERS | {"layer_types": [SLIDING] * 4 + [FULL], "sliding_window": 2048, "max_window_layers": 5,
                            "use_sliding_window": True, "rope_scaling": None, "pad_token_id": None},
    "DFlash 2": LAYERS | DFLASH_2 | {"layer_types": [SLIDING] * 5, "sliding_window": 2048, "use_sliding_window": True,
                                     "is_causal": False, "dflash_config/causal": GONE},
}  # fmt: skip

REFUSED = {
    "causality as a number": ({"is_causal": 1}, "is_causal"),
    "causality as text, inside": (UNSAID | {"dflash_config/causal": "yes"}, "causal"),
    "no layer ids": ({"dflash_config/target_layer_ids": GONE}, "target_layer_ids"),
    "null layer ids": ({"dflash_config/target_layer_ids": None}, "target_layer_ids"),
    "negative layer": ({"dflash_config/target_layer_ids": [-1, 3, 5]}, "target_layer_ids"),
    "falling layers": ({"dflash_config/target_layer_ids": [5, 3, 1]}, "target_layer_ids"),
    "layers as text": ({"dflash_config/target_layer_ids": "1,3,5"}, "target_layer_ids"),
    "layer beyond the target": ({"dflash_config/target_layer_ids": [1, 3, 99]}, "taps layer 99"),
    "null mask": ({"dflash_config/mask_token_id": None}, "mask_token_id"),
    "mask beyond the vocabulary": ({"dflash_config/mask_token_id": 10**6}, "mask id"),
    "two block sizes": ({"dflash_config/block_size": 8}, "block_size"),
    "block of one": ({"block_size": 1}, "block_size"),
    "attention bias without biases": ({"attention_bias": True}, "lacks layers.0.self_attn.k_proj.bias"),
    "attention bias as text": ({"attention_bias": "qkv"}, "attention_bias"),
    "attention bias inside": ({"dflash_config/attention_bias": True}, "dflash_config.attention_bias"),
    "scaled embeddings": ({"dflash_config/input_embedding_scale": 8.0}, "input_embedding_scale"),
    "no norm of queries and keys": ({"use_qk_norm": False}, "use_qk_norm"),
    "value scale": ({"attention_value_scale": 0.5}, "attention_value_scale"),
    "windows by other keys": ({"dflash_config/use_swa": True, "dflash_config/swa_window_size": 1024}, "use_swa"),
    "sinks": ({"dflash_config/attention_sink_bias": True}, "attention_sink_bias"),
    "multiplier": ({"output_multiplier": 0.5}, "output_multiplier"),
    "soft-capping": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "a key of tomorrow": ({"residual_gate": 0.5}, "residual_gate"),
    "a key of tomorrow inside": ({"dflash_config/num_experts": 4}, "dflash_config.num_experts"),
    "no norm before": ({"pre_norm": False}, "pre_norm: False"),
    "no RoPE": ({"use_rope": False}, "use_rope"),
    "RoPE of pairs": ({"is_neox_style": False}, "is_neox_style"),
    "a norm elsewhere": ({"norm_before_fc": False}, "norm_before_fc"),
    "no norm of the target": ({"dflash_config/use_target_norm": False}, "dflash_config.use_target_norm"),
    "a private switch": ({"_use_gate": True}, "_use_gate"),
    "a private switch that is off": ({"_use_gate": False}, "_use_gate"),
    "mixed layers without a window": (MIXED | {"sliding_window": None}, "sliding_window"),
    "mixed layers with a window of nothing": (MIXED | {"sliding_window": 0}, "sliding_window"),
    "a thousand layers and more": ({"num_hidden_layers": 10**30, "layer_types": GONE}, "num_hidden_layers"),
    "unknown layers": ({"layer_types": ["linear_attention"]}, "linear_attention"),
    "too few layer types": ({"num_hidden_layers": 2}, "layer_types"),
    "window without layer types": ({"layer_types": GONE, "use_sliding_window": True, "sliding_window": 8},
                                   "layer_types"),
    "window below the block": (WINDOW | {"sliding_window": 3}, "sliding_window of 3 is smaller than a block of 4"),
    "window that is off": ({"layer_types": ["sliding_attention"], "sliding_window": 8, "use_sliding_window": False},
                           "sliding_window"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 64.0}}, "yarn"),
    "yarn in the new layout": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    "scaled RoPE of old": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "partial RoPE": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "latent attention": ({"dflash_config/attention_mode": "mla"}, "dflash_config.attention_mode"),
    "attention of another mode": ({"dflash_config/attention_mode": "mha"}, "attention_mode is mha"),
    "two RoPE bases": ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters.rope_theta is 1000000.0"),
    "two RoPE bases in the older place": ({"rope_scaling": {"type": "default", "rope_theta": 1e6}},
                                          "rope_scaling.rope_theta is 1000000.0"),
    "another depth": ({"num_target_layers": 36}, "num_target_layers"),
    "another width": ({"hidden_size": 128}, "hidden_size"),
    "a width as text": ({"hidden_size": "64"}, "hidden_size"),
    "heads that RoPE cannot halve": ({"head_dim": 15}, "head_dim must be even"),
    "a base beyond float32": ({"rope_theta": 10**400}, "rope_theta"),
    "a block without end": ({"block_size": 10**30, "dflash_config/block_size": GONE}, "must be at most 1024"),
    "a vocabulary of billions": ({"vocab_size": 10**30}, "vocab_size must be at most"),
    "a width of billions": ({"hidden_size": 10**12}, "hidden_size must be at most"),
    "a width of nothing": ({"hidden_size": None}, "hidden_size"),
    "true is no number": ({"num_hidden_layers": True}, "num_hidden_layers"),
    "infinite norm": ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    "DFlash 2": ({"architectures": ["DFlash2DraftModel"], "dflash_config/selector_rank": 8}, "DFlash 2"),
    "DFlash 2 with a cap": (DFLASH_2 | {"dflash_config/final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "DFlash 2 with groups of no width": (DFLASH_2 | {"dflash_config/conv_group_size": 48}, "conv_group_size"),
    "DFlash 2 with taps without end": (DFLASH_2 | {"dflash_config/conv_kernel_size": 10**30}, "conv_kernel_size"),
    "DFlash 2 by the name of DFlash": (DFLASH_2 | {"architectures": ["DFlashDraftModel"]}, "conv_"),
    "an architecture that is no list": ({"architectures": "DFlashDraftModel"}, "its architecture is DFlashDraftModel"),
    "DSpark": ({"architectures": ["Qwen3DSparkModel"]}, "DSpark"),
    "Domino": ({"architectures": ["Qwen3DominoModel"]}, "Domino"),
    "LiLiCorr": ({"architectures": ["LiLiCorrDraftModel"]}, "LiLiCorr"),
    "P-EAGLE": ({"architectures": ["P_EagleForCausalLM"]}, "P-EAGLE"),
    "Medusa": ({"architectures": ["MedusaModel"], "dflash_config": GONE}, "Medusa"),
    "MTP": ({"architectures": ["DeepSeekMTPModel"], "dflash_config": GONE}, "multi-token prediction"),
    "EAGLE": ({"architectures": ["LlamaForCausalLMEagle3"], "dflash_config": GONE}, "EAGLE"),
    "speculators": ({"architectures": ["DFlashSpeculator"], "speculators_model_type": "dflash", "dflash_config": GONE},
                    "speculators"),
    "speculators by the name of DFlash": ({"speculators_model_type": "dflash"}, "speculators"),
    "a section of the wrong type": ({"dflash_config": [1]}, "dflash_config"),
}  # fmt: skip


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
def test_other_spellings_of_the_same_draft_give_the_same_config(saved: Path, changes: dict[str, Any]) -> None:
    raw = _changed(saved, changes)
    assert DFlashConfig.from_json(raw) == DFlashConfig.from_json(_changed(saved, {}))


@pytest.mark.parametrize(("changes", "layers"), OBEYED.values(), ids=OBEYED)
def test_windows_and_causality_are_read_by_one_rule(
    saved: Path, changes: dict[str, Any], layers: list[tuple[int | None, bool]]
) -> None:
    config = DFlashConfig.from_json(_changed(saved, changes))
    assert [config.layer_attention(index) for index in range(config.num_hidden_layers)] == layers
    assert DFlashConfig.from_json(config.to_json()) == config
    assert serving.layers(config.to_json(), serving.TRAINED) == layers


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_decoded_otherwise_is_refused_by_its_name(
    saved: Path, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_changed(saved, changes)))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    target = targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")
    assert checkpoints.is_draft(tmp_path)  # so that every verb takes the same door
    with pytest.raises(ModelError) as caught:
        export.load_draft(tmp_path, target.config)
    assert said in str(caught.value)
    assert len(str(caught.value)) <= 500
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("changes", PUBLISHED.values(), ids=PUBLISHED)
def test_what_others_publish_loads(saved: Path, changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_changed(saved, changes)))
    family, config = export.read_config(tmp_path)
    assert isinstance(config, DFlashConfig)
    shapes = family.tensor_shapes(config)
    assert ("layers.4.self_attn.o_proj.bias" in shapes) is config.attention_bias
    save_file({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    target = targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")
    assert export.load_draft(tmp_path, target.config).config == config


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("d2t", "ids of a reduced vocabulary"),
        ("layers.0.self_attn.sinks", "attention sinks"),
        ("layers.0.self_attn.q_proj.bias", "biases that its config does not announce"),
        ("mask_embedding", "an embedding of its own for masks"),
        ("markov_head.weight", "DSpark's Markov head"),
        ("lm_head.weight", "a head of another shape than the target's"),
        ("something.else", "what no draft has: something.else"),
    ],
)
def test_what_a_draft_should_not_hold_is_named_and_explained(saved: Path, name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    save_file({**load_file(saved / "model.safetensors"), name: torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        export.load_draft(tmp_path)
    assert name in str(caught.value) and said in str(caught.value)


def _copy(saved: Path, folder: Path, state: dict[str, torch.Tensor]) -> Path:
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    save_file(state, folder / "model.safetensors")
    return folder


def test_a_file_with_an_embedding_for_masks_is_refused_by_its_name(saved: Path, tmp_path: Path) -> None:
    _copy(saved, tmp_path, load_file(saved / "model.safetensors"))
    (tmp_path / "mask_embedding.pt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"an embedding of its own for masks \(mask_embedding\.pt\)"):
        export.load_draft(tmp_path)


def test_other_names_of_tensors_are_read_and_none_twice(saved: Path, tmp_path: Path) -> None:
    state = load_file(saved / "model.safetensors")
    renamed = {"encoder.fc.weight": state["fc.weight"], "encoder.output_norm_enc.weight": state["hidden_norm.weight"]}
    rest = {name: tensor for name, tensor in state.items() if name not in ("fc.weight", "hidden_norm.weight")}
    old = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    loaded = export.load_draft(_copy(saved, tmp_path, rest | renamed | old)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    _copy(saved, tmp_path, state | {"model.fc.weight": 2 * state["fc.weight"]})
    with pytest.raises(ModelError, match=r"fc\.weight is there twice"):
        export.load_draft(tmp_path)


def test_weights_keep_the_dtype_they_are_stored_in(saved: Path, tmp_path: Path) -> None:
    state = load_file(saved / "model.safetensors")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        _copy(saved, tmp_path, {name: tensor.to(dtype) for name, tensor in state.items()})
        assert export.stored_dtype(tmp_path) == dtype  # whatever its config says
    _copy(saved, tmp_path, state | {"fc.weight": state["fc.weight"].bfloat16()})
    assert export.stored_dtype(tmp_path) == torch.float32
    _copy(saved, tmp_path, state | {"fc.weight": state["fc.weight"].to(torch.float8_e4m3fn)})
    with pytest.raises(ModelError, match=r"fc\.weight is stored as F8_E4M3"):
        export.load_draft(tmp_path)


def test_the_depth_of_the_target_may_be_absent(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_changed(saved, {"num_target_layers": GONE})))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    target = targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")
    loaded = export.load_draft(tmp_path, target.config).config
    assert isinstance(loaded, DFlashConfig)
    assert replace(loaded, num_target_layers=8) == export.load_draft(saved, target.config).config
    assert "num_target_layers" not in loaded.to_json()


def test_an_embedding_of_its_own_is_passed_over_and_named(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(saved / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    extra = {"embed_tokens.weight": torch.zeros(1408, 64), "lm_head.weight": torch.zeros(1408, 64)}
    save_file({**state, **extra}, tmp_path / "model.safetensors")
    draft = export.load_draft(tmp_path)
    assert "embed_tokens.weight, lm_head.weight" in capsys.readouterr().err
    assert torch.equal(draft.state_dict()["fc.weight"], state["fc.weight"])
    save_file({**state, "embed_tokens.weight": torch.zeros(32, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"embed_tokens\.weight"):
        export.load_draft(tmp_path)


def test_weights_that_are_not_finite_are_refused_when_read(saved: Path, tmp_path: Path) -> None:
    state = load_file(saved / "model.safetensors")
    state["fc.weight"][0, 0] = float("nan")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="not finite"):
        export.load_draft(tmp_path)


@pytest.mark.parametrize("value", [None, True, -1, 0, 1.5, "x", [], {}, [[]], 10**30, float("nan")], ids=repr)
def test_any_value_at_any_key_is_read_or_refused_in_one_line(saved: Path, value: Any) -> None:
    raw = json.loads((saved / "config.json").read_text())
    paths = [*raw, *(f"dflash_config/{key}" for key in raw["dflash_config"])]
    for path in paths:
        try:
            DFlashConfig.from_json(_changed(saved, {path: value}))
        except ModelError as error:
            assert len(str(error)) <= 500, path
            assert str(error).isprintable(), path
