"""Targets, templates and replies of the same kinds as faults that were found once: read rightly, or refused by name."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dllm.config.load import load_params, parse_params, read_yaml
from dllm.config.params import Source, Target
from dllm.engines.engine import Refusal, Request, Response
from dllm.engines.local import LocalEngine
from dllm.engines.openai.completions import Completions
from dllm.engines.openai.servers import Server
from dllm.errors import ConfigError, DllmError, ModelError, ServerError
from dllm.lm_eval.models import load_model
from dllm.methods.dflash.plan import forward_flops
from dllm.methods.diffusion.build import initial_model
from dllm.models import targets
from dllm.models.experts import weights_per_token
from dllm.models.positions import max_positions
from dllm.models.target_config import LOGIT_SWITCHES, logit_switch
from dllm.prompts.stream import Tally, stream
from dllm.registry import METHODS
from dllm.stages import preflight
from tests.borders.test_target_configs import _copy_of_tiny, _params
from tests.engines.openai.asking import TARGET, engine, outcomes, requests
from tests.engines.openai.loopback_server import serving

SHAPE = {"vocab_size": 1408, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
GRANITE = {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "embedding_multiplier": 1.0}
GRANITE |= {"residual_multiplier": 1.0, "attention_multiplier": 0.25}


def granite(folder: Path, **changes: Any) -> Path:
    return _copy_of_tiny(folder, **{**GRANITE, **changes})


def diffusion_params(model: Path) -> Any:
    raw = {
        "recipe": "mine",
        "target": {"model": str(model), "dtype": "float32"},
        "prepare": {"sources": [{"name": "gsm8k"}]},
        "register": {"model_name": "mine"},
        "train": {"mode": "mdlm", "mdlm": {"mask_token_id": 3}},
    }
    return parse_params(raw)


def distilling(model: Path, share: float) -> Any:
    raw = json.loads(_params(model).model_dump_json(by_alias=True, exclude_none=True))
    raw["train"]["dflash"]["distill"] = share
    return parse_params(raw)


def test_scaled_logits_are_refused_by_all_that_would_compute_them_without_the_scale(tmp_path: Path) -> None:
    plain, scaled = granite(tmp_path / "1", logits_scaling=1.0), granite(tmp_path / "8", logits_scaling=8.0)
    params = diffusion_params(scaled)
    refused = {
        "local": lambda: LocalEngine.check_target(Target(model=str(scaled))),
        "the local engine, loaded": lambda: LocalEngine(targets.load_target(params.target, device="cpu"), None, {2}, 1),
        "lm-eval": lambda: load_model(scaled, torch.device("cpu")),
        "diffusion": lambda: METHODS["mdlm"].check_models(params),
        "diffusion, loaded": lambda: initial_model(params.target, params.train, "cpu"),
        "distillation": lambda: METHODS["dflash"].check_models(distilling(scaled, 0.5)),
    }
    for call in refused.values():
        with pytest.raises(ModelError, match=r"logits_scaling: 8\.0") as caught:
            call()
        assert len(str(caught.value)) <= 500
    METHODS["dflash"].check_models(distilling(scaled, 0.0))  # the draft's own logits have no scale anywhere
    LocalEngine.check_target(Target(model=str(plain)))
    METHODS["mdlm"].check_models(diffusion_params(plain))
    METHODS["dflash"].check_models(distilling(plain, 0.5))
    assert load_model(plain, torch.device("cpu")).kind == "exact"


@pytest.mark.parametrize(
    ("family", "values", "key"),
    [
        ("Granite", {"logits_scaling": 2.0}, "logits_scaling"),
        ("Cohere", {}, "logit_scale"),
        ("FalconH1", {"lm_head_multiplier": 0.5}, "lm_head_multiplier"),
        ("Gemma2", {}, "final_logit_softcapping"),
        ("Phimoe", {"lm_head_bias": True}, "lm_head_bias"),
        ("Llama", {}, None),
        ("Qwen3", {}, None),
        ("Gemma3Text", {}, None),
    ],
)
def test_what_changes_the_logits_is_known_by_its_key(family: str, values: dict[str, Any], key: str | None) -> None:
    found = logit_switch(getattr(transformers, f"{family}Config")(**values))
    assert (found and found.partition(":")[0]) == key
    assert key is None or key in LOGIT_SWITCHES
    assert key is None or logit_switch(getattr(transformers, f"{family}Config")(**values), key) is None


def test_a_head_with_a_bias_is_refused_by_training_which_leaves_it_out(tmp_path: Path) -> None:
    folder = _copy_of_tiny(tmp_path / "m")
    sizes = {**SHAPE, **HEADS, "num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": None}
    sizes.pop("head_dim")
    transformers.PhimoeConfig(**sizes, bos_token_id=1, eos_token_id=2, lm_head_bias=True).save_pretrained(folder)
    (folder / "model.safetensors").unlink()  # no weights are read
    with pytest.raises(ModelError, match="lm_head_bias"):
        METHODS["dflash"].check_models(_params(folder))
    with pytest.raises(ModelError, match="lm_head_bias: True"):
        METHODS["mdlm"].check_models(diffusion_params(folder))
    with pytest.raises(ModelError, match="lm_head_bias"):
        preflight.check(_params(folder))
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return targets.load_tokenizer(TARGET)


def read(tokenizer: Any, request: Request, said: dict[str, Any], reason: Any = "stop") -> Response | Refusal:
    line = Completions("builtin:tiny", TARGET, tokenizer)
    message = {"role": "assistant", **said}
    reply = {"model": "", "choices": [{"message": message, "finish_reason": reason}]}
    return line.response(request, line.read(Server("http://a:1/v1", {}), reply))


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}"


def test_calls_that_the_template_leaves_out_or_nobody_offered_are_rejected(tokenizer: Any) -> None:
    (asked,) = requests(1)
    found = read(tokenizer, asked, {"content": None, "tool_calls": [CALL]}, "tool_calls")
    assert isinstance(found, Refusal) and "the chat template renders no call" in found.reason
    offered = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = replace(asked, tools=offered)  # a template that renders no tools: warned of once, for all rows
    assert isinstance(read(tokenizer, row, {"content": None, "tool_calls": [CALL]}, "tool_calls"), Response)
    caller = copy.deepcopy(tokenizer)
    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + CALLS + "<|im_end|>\n{% endfor %}"
    caller.chat_template = text + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    for tools, name, is_read in ((None, "add", True), (offered, "add", True), (offered, "sub", False)):
        call = {**CALL, "function": {"name": name, "arguments": "{}"}}
        row = replace(asked, tools=tools)
        found = read(caller, row, {"content": "", "tool_calls": [call]}, "tool_calls")
        assert isinstance(found, Response) == is_read, (tools, name)
        assert is_read or "the tool sub, which its request does not offer" in found.reason


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "reasoning_details", "thoughts"])
def test_reasoning_beside_the_text_is_refused_under_any_name(tokenizer: Any, field: str) -> None:
    (asked,) = requests(1)
    for value in ("so", [{"text": "so"}], {"text": "so"}):
        with pytest.raises(ServerError, match=f"separates the reasoning .*{field}"):
            read(tokenizer, asked, {"content": "yes", field: value})
    for value in (None, "", [], {}, 0, 12, False):
        assert isinstance(read(tokenizer, asked, {"content": "yes", field: value, "stop_reason": "eos"}), Response)


@pytest.mark.parametrize(
    ("said", "reason"),
    [("eos", "stop"), ("eos_token", "stop"), ("end_turn", "stop"), ("max_tokens", "length"), ("stop", "stop")],
)
def test_endings_by_other_names_are_those_they_mean(tokenizer: Any, said: str, reason: str) -> None:
    found = read(tokenizer, requests(1)[0], {"content": "yes"}, said)
    assert isinstance(found, Response) and found.finish_reason == reason


def test_a_reply_that_names_no_model_is_that_of_the_right_one(tokenizer: Any) -> None:
    found = read(tokenizer, requests(1)[0], {"content": "yes"})  # with an empty name
    assert isinstance(found, Response) and found.text == "yes"


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ({"error": {"message": "The model `builtin:tiny` does not exist.", "code": 404}}, "lists this model, and does"),
        ({"detail": "Not Found"}, "ends in /v1"),
        (b"404 page not found", "ends in /v1"),
    ],
)
def test_a_404_gets_the_hint_that_fits_its_words(tokenizer: Any, said: Any, hint: str) -> None:
    with serving() as server:
        server.complaint, server.always = said, (404, {})
        with pytest.raises(ServerError, match=hint):
            outcomes(engine(server.url, tokenizer), 2)


def said(*pairs: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in (pair.split(":") for pair in pairs)]}


TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ROWS = [said("user:one"), said("system:be brief", "user:two"), said("user:three", "assistant:3", "user:four")]
DROPPED = {
    "system turns": ("{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}", ["system"]),
    "all but the last": ("{% for m in messages[-1:] %}" + TURN + "{% endfor %}", ["user", "system", "assistant"]),
    "responses": ("{% for m in messages if m.role != 'assistant' %}" + TURN + "{% endfor %}", ["assistant"]),
    "nothing": ("{% for m in messages %}" + TURN + "{% endfor %}", []),
}  # fmt: skip


@pytest.mark.parametrize(("template", "roles"), DROPPED.values(), ids=DROPPED)
def test_turns_that_the_template_leaves_out_are_named(
    tmp_path: Path, tokenizer: Any, template: str, roles: list[str]
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tally = Tally()
    assert len(list(stream(Source(name="a.jsonl"), tmp_path, tally=tally))) == 3
    lossy = copy.deepcopy(tokenizer)
    lossy.chat_template = template + OPEN
    rest = "which the target's chat template does not render: it never sees them"
    assert tally.unseen(lossy) == [f"warning: the rows have {role} turns, {rest}" for role in roles]
    lossy.chat_template = "{{ raise_exception('no') }}"
    assert tally.unseen(lossy) == []


def test_a_template_that_writes_the_date_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _copy_of_tiny(tmp_path / "m")
    preflight.check(_params(folder))
    assert "date" not in capsys.readouterr().err
    path = folder / "chat_template.jinja"
    text = path.read_text()
    path.unlink()
    path.write_text("<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n" + text)
    preflight.check(_params(folder))
    assert "writes today's date (strftime_now)" in capsys.readouterr().err


def changed(section: str, **values: Any) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(_params("builtin:tiny").model_dump_json(by_alias=True, exclude_none=True))
    raw[section] |= values
    return raw


WITHOUT_EFFECT: dict[str, tuple[str, dict[str, Any], str]] = {
    "servers": ("regenerate", {"servers": ["http://a:1/v1"]}, r"engine local uses no server.*regenerate\.servers"),
    "a name of servers": ("regenerate", {"served_model": "m"}, r"uses no server.*regenerate\.served_model"),
    "servers of a dataset": ("regenerate", {"engine": "dataset", "turns": "last", "served_model": "m"}, "no server"),
    "top_p": ("regenerate", {"top_p": 0.9}, "top_p requires sampling"),
    "thinking": ("target", {"enable_thinking": True}, r"same prompts with thinking.*target\.enable_thinking"),
    "a commit": ("target", {"revision": "main"}, r"no revision.*target\.revision: main"),
}


@pytest.mark.parametrize(("section", "values", "words"), WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(section: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(DllmError, match=words):
        preflight.check(parse_params(changed(section, **values)))


def test_options_that_have_an_effect_pass() -> None:
    for values in ({"top_p": 0.9, "temperature": 0.5}, {"engine": "openai", "servers": ["http://a:1"]}):
        preflight.check(parse_params(changed("regenerate", **values)))


def test_a_revision_of_a_directory_is_refused(tmp_path: Path) -> None:
    folder = _copy_of_tiny(tmp_path / "m")
    with pytest.raises(ConfigError, match="a directory has no revision"):
        preflight.check(parse_params(changed("target", model=str(folder), revision="main")))


def test_a_column_to_ignore_that_no_row_has_is_named(tmp_path: Path) -> None:
    rows = [{**row, "input": "x", "extra": {"a": 1}} for row in ROWS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tally = Tally()
    list(stream(Source(name="a.jsonl", ignore_columns=["input", "inputs", "extra"]), tmp_path, tally=tally))
    warned = [line for line in tally.lines() if line.startswith("warning")]
    assert warned == ["warning: no row has the column inputs to ignore"]


def test_an_adapter_is_told_from_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        targets.locate(Target(model=str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"an adapter \(adapter_config\.json\).*merge it"):
        targets.locate(Target(model=str(tmp_path)))


def test_a_missing_shard_is_named_before_anything_is_generated(tmp_path: Path) -> None:
    folder = _copy_of_tiny(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"weight_map": {key: names[number % 2] for number, key in enumerate(sorted(weights))}}
    for name in names:
        part = {key: weights[key] for key, file in index["weight_map"].items() if file == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    preflight.check(_params(folder))
    (folder / names[1]).unlink()
    with pytest.raises(ModelError, match=f"1 of 2 files .* missing, {names[1]}"):
        preflight.check(_params(folder))
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot read the index"):
        preflight.check(_params(folder))


@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_yarn_without_a_number_of_its_own_starts_from_all_positions(tmp_path: Path, section: str) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    folder = _copy_of_tiny(tmp_path / "m", **{"rope_parameters": "GONE", section: yarn})
    assert max_positions(Target(model=str(folder))) == 4 * 2048


@pytest.mark.parametrize("text", ["12e4567", "1234567", "on", "true"])
def test_a_commit_that_yaml_reads_as_a_number_is_to_be_quoted(tmp_path: Path, text: str) -> None:
    raw = "recipe: m\ntarget: {model: a/b, revision: %s}\nprepare: {sources: [{name: gsm8k}]}\n"
    path = tmp_path / "params.yaml"
    path.write_text(raw % text + "register: {model_name: m}\n")
    if isinstance(read_yaml(text), str):
        assert load_params(path).target.revision == text
        return
    with pytest.raises(ConfigError, match=r"target\.revision: .*valid string; put it in quotes"):
        load_params(path)
    path.write_text(raw % f'"{text}"' + "register: {model_name: m}\n")
    assert load_params(path).target.revision == text


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 96, "num_key_value_heads": 2, "num_attention_heads": 4}
FAMILIES = {
    "Qwen3Moe": {"num_experts": 32, "mlp_only_layers": []},
    "Mixtral": {"num_local_experts": 32, "intermediate_size": 96, "head_dim": 16},
    "GraniteMoe": {"num_local_experts": 32, "intermediate_size": 96, "head_dim": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_costs_the_experts_that_it_is_routed_to(family: str) -> None:
    def cost(**values: Any) -> float:
        config = getattr(transformers, f"{family}Config")(**{**SHAPE, **MOE, **FAMILIES[family], **values})
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        used = sum(number for _, number in weights_per_token(model, config))
        assert used < sum(each.numel() for each in model.parameters()) / 2
        return forward_flops(model, 1)

    router, expert = 64, 3 * 64 * 96
    few, more = cost(), cost(num_experts_per_tok=4)
    assert more - few == pytest.approx(2 * SHAPE["num_hidden_layers"] * 2 * expert)
    others = {"num_experts": 64} if "num_experts" in FAMILIES[family] else {"num_local_experts": 64}
    assert cost(**others) - few == pytest.approx(2 * SHAPE["num_hidden_layers"] * 32 * router)
