"""A target with gated delta nets: a draft is trained for it, and its acceptance counted, without decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3NextConfig, Qwen3NextForCausalLM

from dllm.config.load import parse_params
from dllm.config.params import Params, Target
from dllm.decoding.speculative import Decoder
from dllm.errors import ConfigError, ModelError
from dllm.models import targets
from dllm.models.drafts.checkpoint import load_draft
from dllm.stages import evaluate, preflight, prepare, regenerate, train

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def make_qwen3_next(folder: Path, tokens: dict[str, int]) -> None:
    shape = Qwen3NextConfig(**SHAPE, **tokens, num_experts=0, mlp_only_layers=list(range(8)))
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(shape)
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    shape.architectures = ["Qwen3NextForCausalLM"]
    shape.save_pretrained(folder)


def make_qwen3_5(folder: Path, tokens: dict[str, int]) -> None:
    """As published: a language model within one for images, and keys that transformers' code does not name."""
    keys = {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "full_attention_interval": 4}
    keys |= {"output_gate_type": "swish", "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    rope = {"mrope_interleaved": True, "mrope_section": [1, 0, 0], "rope_type": "default", "rope_theta": 10_000_000}
    text = {**SHAPE, **tokens, **keys, "mlp_only_layers": []}
    text |= {"rope_parameters": {**rope, "partial_rotary_factor": 0.25}, "tie_word_embeddings": True}
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=dict(text), vision_config=dict(eyes), tie_word_embeddings=True)
    )
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    weights["mtp.fc.weight"] = torch.zeros(32, 64)  # a prediction head, which is not read
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text["model_type"] = "qwen3_5_text"
    raw = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": 5,
        "language_model_only": False,
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": True,
        "vision_config": {**eyes, "model_type": "qwen3_5"},
    }
    (folder / "config.json").write_text(json.dumps(raw))


MAKE = {"qwen3_next": make_qwen3_next, "qwen3_5": make_qwen3_5}


@pytest.fixture(scope="module", params=MAKE)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with gated delta nets, and the tokenizer of builtin:tiny."""
    folder = tmp_path_factory.mktemp("models") / request.param
    shutil.copytree(targets.locate(Target(model="builtin:tiny")), folder)
    tiny = json.loads((folder / "config.json").read_text())
    MAKE[request.param](folder, {name: tiny[name] for name in ("vocab_size", "eos_token_id")})
    return folder


def params(target: Path, source: Path, engine: str = "dataset", **evaluation: Any) -> Params:
    draft = {"num_hidden_layers": 1, "num_target_layers_tapped": 3}
    dflash = {"block_size": 4, "num_blocks_per_sample": 8, "walk_samples": 2, "draft": draft}
    return parse_params(
        {
            "recipe": "test",
            "target": {"model": str(target), "dtype": "float32"},
            "prepare": {"sources": [{"name": str(source)}], "heldout_fraction": 0.4},
            "regenerate": {"engine": engine, "turns": "last"},
            "train": {"epochs": 2, "batch_size": 2, "compute_dtype": "float32", "dflash": dflash},
            "evaluate": {"max_new_tokens": 12, **evaluation},
            "register": {"model_name": "test"},
        }
    )


@pytest.mark.slow
def test_it_is_trained_and_measured_and_not_decoded(
    target: Path, tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    chats = [
        [{"role": "user", "content": f"word {n} and some"}, {"role": "assistant", "content": f"the answer {n} is long"}]
        for n in range(12)
    ]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    asked = params(target, source)
    prepare.run(asked, tmp_path)
    assert "keeps a recurrent state" in capfd.readouterr().err
    regenerate.run(asked, tmp_path)
    trained = train.run(asked, tmp_path)
    assert trained["val_walked_acceptance_length"] >= 1, "counted on greedy responses, which the dataset's are not"
    found = evaluate.run(asked, tmp_path)
    assert found["prompts"] == 0 and found["speedup"] is None and "recurrent state" in found["decoding"]
    assert "recurrent state" in capfd.readouterr().err
    walked = found["walked"]
    assert walked["prompts"] > 2 and walked["greedy_fraction"] == 1 and 1 <= walked["tau_micro"] <= 4

    model = targets.load_target(asked.target)
    draft = load_draft(tmp_path / "out" / "train" / "checkpoint")
    with pytest.raises(ConfigError, match=r"evaluate.temperature is 0.8.*recurrent state"):
        evaluate.run(params(target, source, temperature=0.8), tmp_path)
    with pytest.raises(ModelError, match="recurrent state"):
        Decoder(model, draft).generate([5, 6, 7], max_new_tokens=4)


def test_what_cannot_work_is_refused_by_prepare(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"local engine supports full attention only.*linear_attention"):
        preflight.check(params(target, tmp_path, "local"))
    with pytest.raises(ConfigError, match=r"evaluate.walk.prompts is 0.*recurrent state"):
        preflight.check(params(target, tmp_path, walk={"prompts": 0}))
    with pytest.raises(ConfigError, match=r"evaluate.temperature is 1.*recurrent state"):
        preflight.check(params(target, tmp_path, temperature=1))


@pytest.mark.parametrize(("window", "said"), [(None, "several prompts together"), (6, "one prompt at a time")])
def test_prepare_says_how_a_target_decodes_with_a_draft(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], window: int | None, said: str
) -> None:
    folder = tmp_path / "target"
    shutil.copytree(targets.locate(Target(model="builtin:tiny")), folder)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    (folder / "config.json").write_text(json.dumps(raw))
    preflight.check(params(folder, tmp_path))
    assert f"{folder}: a draft can be trained for it, and decodes {said}" in capfd.readouterr().err
