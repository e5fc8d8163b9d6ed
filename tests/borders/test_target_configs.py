"""A target is read as its authors meant it, or refused by name before anything is generated."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dllm.config.load import parse_params
from dllm.config.params import Target
from dllm.errors import DllmError, ModelError
from dllm.models import builtin, checkpoints, config_keys, targets
from dllm.models.target_config import check_config
from dllm.stages import preflight

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
             "use_sliding_window": False, "transformers.js_config": {"x": 1}, "is_llama_config": True}  # fmt: skip
    folder = _copy_of_tiny(tmp_path / "m", **inert)
    preflight.check(_params(folder))
    assert set(transformers.PretrainedConfig().to_dict()) <= config_keys.INERT | {"_name_or_path"}


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Phi3", "Olmo2", "Granite"])
def test_a_config_that_the_library_writes_is_known_to_it(tmp_path: Path, family: str) -> None:
    config = getattr(transformers, f"{family}Config")(**SHAPE)
    config.save_pretrained(tmp_path)
    check_config(Target(model=str(tmp_path)), tmp_path)
    old = {**json.loads((tmp_path / "config.json").read_text()), "rope_theta": 1e4, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in old.items() if k != "rope_parameters"}))
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
    for call in (targets.identity, lambda target: targets.load_target(target, device="cpu")):
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
