"""A target is read as its authors meant it, or refused by name before anything is generated."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dllm.config.load import parse_params
from dllm.config.params import Target
from dllm.engines.local import LocalEngine
from dllm.errors import DllmError, ModelError
from dllm.methods.diffusion.build import check_family
from dllm.models import builtin, checkpoints, config_keys, target_identity, targets
from dllm.models.diffusion.families import load_diffusion_lm
from dllm.models.target_config import check_config
from dllm.stages import preflight
from tests.models.diffusion.llada_code import published

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1408,
    "max_position_embeddings": 512,
}


def _copy_of_tiny(folder: Path, **changes: Any) -> Path:
    shutil.copytree(builtin.directory("builtin:tiny"), folder)
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.unlink()
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "GONE"}))
    return folder


def _params(model: Path | str) -> Any:
    dflash = {"block_size": 4, "draft": {"num_target_layers_tapped": 3}}
    raw = {
        "recipe": "mine",
        "target": {"model": str(model), "dtype": "float32"},
        "prepare": {"sources": [{"name": "gsm8k"}]},
        "register": {"model_name": "mine"},
        "train": {"mode": "dflash", "dflash": dflash},
    }
    return parse_params(raw)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 128),
        ("logit_scale", 0.5),
        ("final_logit_softcapping", 30.0),
        ("attention_sink_bias", True),
        ("residual_multiplier", 0.2),
        ("use_swa", True),
        ("a_switch_of_tomorrow", "on"),
        ("pre_norm", False),
        ("final_norm", False),
        ("use_rope", False),
        ("is_neox_style", False),
        ("_use_gate", True),
    ],
)
def test_a_key_that_the_model_code_never_names_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    folder = _copy_of_tiny(tmp_path / "m", **{key: value})
    with pytest.raises(ModelError, match=key) as caught:
        targets.load_target(Target(model=str(folder), dtype="float32"), device="cpu")
    assert len(str(caught.value)) <= 500
    with pytest.raises(ModelError, match=key):
        preflight.check(_params(folder))


def test_keys_that_shape_nothing_pass(tmp_path: Path) -> None:
    inert = {"unsloth_version": "2026.1", "_commit_hash": "a", "torch_dtype": "float32", "sliding_window": None,
             "use_sliding_window": False, "transformers.js_config": {"x": 1}, "is_llama_config": True,
             "rope_interleaved": False, "use_mrope": False, "lm_head_bias": False, "a_list_of_tomorrow": [],
             "add_cross_attention": False, "_attn_implementation_autoset": True}  # fmt: skip
    folder = _copy_of_tiny(tmp_path / "m", **inert)
    preflight.check(_params(folder))
    assert set(transformers.PretrainedConfig().to_dict()) <= config_keys.INERT | {"_name_or_path"}


LIBRARY = ["Llama", "Qwen2", "Qwen3", "Qwen3Moe", "Mistral", "Gemma2", "Gemma3Text", "Phi3", "Olmo2", "Granite"]
LIBRARY += ["GptOss", "StableLm", "Mamba"]


@pytest.mark.parametrize("family", LIBRARY)
def test_a_config_that_the_library_writes_is_known_to_it(tmp_path: Path, family: str) -> None:
    config = getattr(transformers, f"{family}Config")(**SHAPE)
    config.save_pretrained(tmp_path)
    check_config(Target(model=str(tmp_path)), tmp_path)
    old = {**config.to_dict(), "rope_theta": 1e4, "rope_scaling": None}  # with all defaults, most of them false
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in old.items() if k != "rope_parameters"}))
    check_config(Target(model=str(tmp_path)), tmp_path)


PUBLISHED = {
    "SmolLM2": {"model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None,
                "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "pretraining_tp": 1},
    "Qwen2.5": {"model_type": "qwen2", "max_window_layers": 24, "sliding_window": 32768, "use_mrope": False,
                "use_sliding_window": False, "torch_dtype": "bfloat16"},
    "Qwen3": {"model_type": "qwen3", "attention_bias": False, "max_window_layers": 36, "sliding_window": None,
              "use_sliding_window": False, "head_dim": 16},
    "Llama 3.1": {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
                  "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 256}},
    "Phi 3": {"model_type": "phi3", "attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
              "original_max_position_embeddings": 512, "rope_scaling": None, "sliding_window": None},
}  # fmt: skip


@pytest.mark.parametrize("keys", PUBLISHED.values(), ids=PUBLISHED)
def test_keys_that_published_targets_have_are_known(tmp_path: Path, keys: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**SHAPE, "tie_word_embeddings": False, "rope_theta": 1e4, **keys})
    )
    check_config(Target(model=str(tmp_path)), tmp_path)


UNSUPPORTED = {
    "no such architecture": ({"model_type": "zamba9"}, "zamba9"),
    "code of its own": ({"model_type": "Dream", "auto_map": {"AutoModel": "modeling.M"}}, "trust"),
    "a model type that is no text": ({"model_type": 3}, "model_type"),
    "an encoder": ({"model_type": "vit"}, "vit"),
    "too few layers to tap": ({"num_hidden_layers": 2}, "layers"),
}


@pytest.mark.parametrize(("changes", "said"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_not_supported_is_said_before_anything_is_paid_for(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = _copy_of_tiny(tmp_path / "m", **changes)
    (folder / "model.safetensors").unlink()  # no weights are read
    with pytest.raises(ModelError, match=said) as caught:
        preflight.check(_params(folder))
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize("kind", ["stablelm", "mamba"])
def test_a_target_that_no_draft_can_be_made_for_is_refused_by_prepare(tmp_path: Path, kind: str) -> None:
    folder = _copy_of_tiny(tmp_path / "m")
    if kind == "stablelm":
        transformers.StableLmConfig(**SHAPE, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    else:
        transformers.MambaConfig(hidden_size=64, num_hidden_layers=8, vocab_size=1408, state_size=4).save_pretrained(
            folder
        )
    with pytest.raises(ModelError, match=r"rms_norm_eps|recurrent state") as caught:
        preflight.check(_params(folder))
    assert str(caught.value).isprintable()


def test_a_template_that_renders_no_question_is_refused_by_prepare(tmp_path: Path) -> None:
    folder = _copy_of_tiny(tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DllmError, match="template"):
        preflight.check(_params(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "llama"', "[" * 100_000, "\udcff"])
def test_a_broken_config_is_one_line(tmp_path: Path, text: str) -> None:
    folder = _copy_of_tiny(tmp_path / "m")
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    for call in (preflight.check, lambda params: targets.load_target(params.target, device="cpu")):
        with pytest.raises(DllmError) as caught:
            call(_params(folder))
        assert len(str(caught.value)) <= 500
        assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = _copy_of_tiny(tmp_path / "m")
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return Path.touch, (ran,)

    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload()}, folder / "pytorch_model.bin")
    for call in (target_identity.identity, lambda target: targets.load_target(target, device="cpu")):
        with pytest.raises(ModelError, match="safetensors") as caught:
            call(Target(model=str(folder), dtype="float32"))
        assert "weights_only" not in str(caught.value)
    assert not ran.exists()


@pytest.mark.parametrize("model", ["../elsewhere", "/etc", "~/model", "./x", "a/b/c"])
def test_a_record_in_a_checkpoint_is_not_followed_to_a_path(tmp_path: Path, model: str) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    record = {"identity": {"target": {"model": model, "revision": "0" * 40, "trust_remote_code": True}}}
    (checkpoint / "run.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="--target"):
        checkpoints.target_of(checkpoint, tmp_path)


def test_a_record_in_a_checkpoint_gives_neither_commit_nor_trust(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    record = {"identity": {"target": {"model": "some/model", "revision": "0" * 40, "trust_remote_code": True}}}
    (checkpoint / "run.json").write_text(json.dumps(record))
    assert checkpoints.target_of(checkpoint, tmp_path) == Target(model="some/model")
    pinned = {"model": "some/model", "revision": "1" * 40, "trust_remote_code": True}
    raw = {
        "recipe": "r",
        "target": pinned,
        "prepare": {"sources": [{"name": "gsm8k"}]},
        "register": {"model_name": "m"},
    }
    (tmp_path / "params.yaml").write_text(json.dumps(raw))
    assert checkpoints.target_of(checkpoint, tmp_path) == Target(**pinned)


@pytest.mark.parametrize("pointer", ["../../elsewhere", "/etc", "..", ".", "a/b", "\0", "x" * 5000])
def test_a_pointer_file_names_a_step_beside_it_only(tmp_path: Path, pointer: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(builtin.directory("builtin:tiny"), elsewhere)
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "LATEST").write_text(pointer)
    with pytest.raises(ModelError, match="no checkpoint in this directory"):
        checkpoints.resolve(run, tmp_path)


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "a kind of RoPE": ({"rope_scaling": {"type": "su", "factor": 8.0}}, "rope_scaling of the type 'su'"),
    "a key of RoPE": ({"rope_parameters": {"rope_type": "default", "xpos_scale": 512}}, "rope_parameters.xpos_scale"),
    "RoPE without its factor": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
    "RoPE of a part": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "an activation": ({"hidden_act": "squircle"}, "squircle"),
    "a text for a number": ({"vocab_size": "1408"}, "vocab_size"),
    "null for a size": ({"hidden_size": None}, "hidden_size"),
    "no layers": ({"num_hidden_layers": -1}, "num_hidden_layers"),
    "heads": ({"num_attention_heads": 5}, "attention heads"),
    "weights that an absent package reads": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"\(gptq\)"),
    "no quantization": ({"quantization_config": {"quant_method": "mine"}}, r"\(mine\)"),
}


@pytest.mark.parametrize(("changes", "said"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_config_that_cannot_be_built_is_one_line_at_prepare_and_at_load(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = _copy_of_tiny(tmp_path / "m", **changes)
    for call in (preflight.check, lambda params: targets.load_target(params.target, device="cpu")):
        with pytest.raises(ModelError, match=said) as caught:
            call(_params(folder))
        assert len(str(caught.value)) <= 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 6}, r"leaves out 18 tensors.*layers\.6\."),
        ({"vocab_size": 1472}, r"embed_tokens\.weight is \(1408, 64\), expected \(1472, 64\)"),
        ({"attention_bias": True}, r"lacks 32 tensors"),
    ],
)
def test_weights_that_the_config_does_not_describe_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = _copy_of_tiny(tmp_path / "m", **changes)
    with pytest.raises(ModelError, match=said):
        targets.load_target(Target(model=str(folder), dtype="float32"), device="cpu")
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_weights_beside_the_model_pass(tmp_path: Path) -> None:
    folder = _copy_of_tiny(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "v_head.weight": torch.ones(1, 64)}
    (folder / "model.safetensors").unlink()
    save_file({**weights, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    targets.load_target(Target(model=str(folder), dtype="float32"), device="cpu")


@pytest.mark.parametrize("family", ["Mistral", "Phi3", "Gemma2", "GptOss", "StableLm"])
def test_attention_that_the_local_engine_has_not_is_refused_before_weights_are_read(
    tmp_path: Path, family: str
) -> None:
    folder = _copy_of_tiny(tmp_path / "m")
    windows = {"sliding_window": 16} if family in ("Mistral", "Phi3") else {}
    alone = {"GptOss": {"layer_types": ["full_attention"] * 8}, "Phi3": {"pad_token_id": 0}}.get(family, {})
    getattr(transformers, f"{family}Config")(**SHAPE, **windows, **alone).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"supports full attention only.*engine: openai"):
        LocalEngine.check_target(Target(model=str(folder)))


@pytest.mark.parametrize("text", ["[]", '{"tokenizer_class": 3}', "{", '{"chat_template": 7}'])
def test_a_broken_tokenizer_is_one_line(tmp_path: Path, text: str) -> None:
    folder = _copy_of_tiny(tmp_path / "m")
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(text)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DllmError) as caught:
        preflight.check(_params(folder))
    assert len(str(caught.value)) <= 500 and "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = _copy_of_tiny(tmp_path / "m")
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    end = next(token for token in raw["added_tokens"] if token["content"] == "<|im_end|>")
    end["id"] = raw["model"]["vocab"]["<|im_end|>"] = 5000
    path.unlink()
    path.write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"token \d+ .*the embedding 1408 rows"):
        preflight.check(_params(folder))


SHIFTED = {"model_type": "Dream", "auto_map": {"AutoConfig": "modeling.C", "AutoModel": "modeling.M"}}


def test_a_diffusion_model_of_own_code_that_no_family_knows_is_refused_by_name(tmp_path: Path) -> None:
    folder = _copy_of_tiny(tmp_path / "m", **SHIFTED)
    trusted = Target(model=str(folder), trust_remote_code=True)
    with pytest.raises(ModelError, match=r"'Dream'.* none of llada.*next token.*model-family\.md"):
        load_diffusion_lm(trusted, mask_token_id=3)
    with pytest.raises(ModelError, match="Dream"):
        check_family(trusted, _params(folder).train)


@pytest.mark.parametrize(
    ("key", "value"), [("scale_logits", True), ("clip_qkv", 8.0), ("layer_norm_with_affine", False), ("a_switch", 1)]
)
def test_a_llada_with_a_switch_that_llama_has_not_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    published(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    for call in (load_diffusion_lm, lambda target: check_config(target, tmp_path / "m")):
        with pytest.raises(ModelError, match=key):
            call(Target(model=str(tmp_path / "m"), dtype="float32"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e39])
def test_weights_that_are_not_finite_are_named_when_the_target_is_loaded(tmp_path: Path, bad: float) -> None:
    folder = _copy_of_tiny(tmp_path / "m")
    file = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name = "model.layers.3.mlp.up_proj.weight"
    weights[name] = weights[name].double()
    weights[name][5, 7] = bad  # the last one is finite, and not so in float32
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 tensors of the target .* not finite in float32, {name}") as caught:
        targets.load_target(Target(model=str(folder), dtype="float32"), device="cpu")
    assert len(str(caught.value)) <= 500


def test_every_kind_of_tensor_can_be_looked_through() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8):
        assert targets.is_finite(torch.ones(3, 4).to(dtype))
    widest = torch.tensor([65504.0, -65504.0], dtype=torch.float16)
    assert targets.is_finite(widest) and not targets.is_finite(widest * 2)
    assert not targets.is_finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))
    assert targets.is_finite(torch.ones(0)) and targets.is_finite(torch.ones(2, device="meta"))
