"""What each serving engine reads of a draft, as we found it in their code, held against what we export."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dllm.errors import ConfigError, ModelError
from dllm.methods.dflash.settings import Draft
from dllm.models.drafts import serving
from dllm.models.drafts.checkpoint import save_draft
from dllm.models.drafts.serving import CANDIDATES, TRAINED, layers, lookup, require
from dllm.models.targets import empty_target
from dllm.registry import DRAFTS, SERVING_ENGINES
from tests.models.small_models import TINY

MASK, TAPS = "dflash_config.mask_token_id", "dflash_config.target_layer_ids"
PLACES = {
    # engine: block size, mask id, layer ids, causality; each where it is read first
    "sglang": ("dflash_config.block_size", MASK, TAPS, "is_causal"),
    "vllm": (None, MASK, TAPS, "is_causal"),
    "lmdeploy": ("dflash_config.block_size", MASK, TAPS, "dflash_config.causal"),
    "trtllm": ("dflash_config.block_size", MASK, TAPS, None),
    "llamacpp": ("dflash_config.block_size", MASK, TAPS, None),
    "z-lab": ("dflash_config.block_size", MASK, TAPS, "is_causal"),
}
DECODES = {
    # layers, is_causal: who decodes them as trained, plain and with DFlash 2
    "full": (("f", "f"), False, "sglang vllm lmdeploy trtllm llamacpp z-lab", "sglang vllm trtllm llamacpp z-lab"),
    "full, causal": (("f", "f"), True, "sglang vllm z-lab", "sglang vllm trtllm z-lab"),
    "window": (("s", "s"), False, "sglang vllm llamacpp z-lab", "sglang vllm trtllm llamacpp z-lab"),
    "window, causal": (("s", "s"), True, "sglang vllm lmdeploy trtllm z-lab", "sglang vllm trtllm z-lab"),
    "mixed": (("s", "f"), None, "sglang vllm lmdeploy trtllm z-lab", "sglang vllm trtllm z-lab"),
    "mixed, causal": (("s", "f"), True, "sglang vllm z-lab", "sglang vllm trtllm z-lab"),
    "mixed, bidirectional": (("s", "f"), False, "sglang vllm llamacpp z-lab", "sglang vllm trtllm llamacpp z-lab"),
}
KINDS = {"f": "full_attention", "s": "sliding_attention"}


@dataclass
class Stated:
    """A config that states anything, whichever family it may be of."""

    raw: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        value = lookup(self.raw, f"dflash_config.{name}")
        return tuple(value) if isinstance(value, list) else value

    def to_json(self) -> dict[str, Any]:
        return self.raw


def stated(kinds: tuple[str, ...], is_causal: bool | None, name: str = "DFlashDraftModel", **more: Any) -> Stated:
    inner = {"block_size": 8, "causal": is_causal, "mask_token_id": 3, "target_layer_ids": [1, 3, 5]}
    if name == "DFlash2DraftModel":
        inner |= {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16}
    raw = {
        "architectures": [name], "block_size": 8, "dflash_config": inner, "hidden_size": 512, "is_causal": is_causal,
        "layer_types": [KINDS[kind] for kind in kinds], "num_target_layers": 8,
        "sliding_window": 2048 if "s" in kinds else None, "use_sliding_window": "s" in kinds,
    }  # fmt: skip
    return Stated(raw | more)


@pytest.mark.parametrize("name", list(DRAFTS))
def test_an_export_has_every_key_where_each_engine_reads_it_first(name: str, tmp_path: Path) -> None:
    target: Any = empty_target(TINY).config
    settings = Draft(architecture=name, num_hidden_layers=2, num_target_layers_tapped=3)
    config = DRAFTS[name].config_for(target, settings, block_size=4, mask_token_id=3)
    draft = DRAFTS[name](config)
    draft.reset_parameters(seed=0)
    save_draft(draft, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    expected = (4, 3, list(config.target_layer_ids), False)
    for engine, places in PLACES.items():
        for place, value in zip(places, expected, strict=True):
            assert place is None or lookup(raw, place) == value, (engine, place)
    assert raw["block_size"] == raw["dflash_config"]["block_size"]
    assert raw["is_causal"] is raw["dflash_config"]["causal"]
    assert len(raw["layer_types"]) == 2 and raw["num_target_layers"] == target.num_hidden_layers
    if raw["architectures"] == ["DFlash2DraftModel"]:
        assert all(lookup(raw, key) for key in CANDIDATES)


def test_every_engine_of_the_registry_is_in_the_tables() -> None:
    assert set(PLACES) == set(SERVING_ENGINES)
    for name, engine in SERVING_ENGINES.items():
        for value, place in zip(("block_size", "mask_token_id", "target_layer_ids"), PLACES[name], strict=False):
            read = engine.reads.get(value, (None,))
            assert place in (read[0], None), (name, value)


@pytest.mark.parametrize("case", DECODES)
@pytest.mark.parametrize("architecture", ["DFlashDraftModel", "DFlash2DraftModel"])
def test_who_decodes_which_attention(case: str, architecture: str) -> None:
    kinds, is_causal, plain, candidates = DECODES[case]
    config = stated(kinds, is_causal, architecture)
    able = [name for name, engine in SERVING_ENGINES.items() if engine.refusal(config) is None]
    assert able == (plain if architecture == "DFlashDraftModel" else candidates).split()
    for name, engine in SERVING_ENGINES.items():
        if name not in able:
            with pytest.raises(ModelError, match=engine.title.partition(" ")[0]) as refused:
                require(name, config, "draft")
            assert len(str(refused.value)) < 300 and all(other in str(refused.value) for other in able)


@pytest.mark.parametrize(
    ("engine", "config", "said"),
    [
        ("lmdeploy", stated(("f",), False, "DFlash2DraftModel"), "LMDeploy 0.18 has no DFlash2DraftModel"),
        ("llamacpp", stated(("s",), True), "would decode layer 0 with bidirectional attention in a window of 2048"),
        ("llamacpp", stated(("f",), False, "DFlash2DraftModel", hidden_size=64), "needs a hidden size of 272"),
        ("llamacpp", stated(("f",), False, attention_bias=True), "no biases"),
        ("lmdeploy", stated(("s",), False), "has no bidirectional attention in a window of 2048, as in layer 0"),
        ("lmdeploy", stated(("f",), False, num_target_layers=None), "needs num_target_layers"),
        ("z-lab", stated(("f",), False, num_target_layers=None), "dflash 0.1.0 needs num_target_layers"),
        ("z-lab", stated(("f",), False, "DFlash2DraftModel", num_target_layers=None), "needs num_target_layers"),
        ("trtllm", stated(("s",), True, use_sliding_window=False), "use_sliding_window"),
        ("sglang", stated(("f",), False, architectures=["Qwen3DSparkModel"]), "has no Qwen3DSparkModel"),
        ("sglang", stated(("f",), False, layer_types=None), "needs layer_types"),
    ],
)
def test_a_refusal_names_the_engine_and_the_reason(engine: str, config: Stated, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        require(engine, config, "draft")


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean sglang"):
        require("sgland", stated(("f",), False), "draft")


def test_where_one_key_is_missing_the_engine_that_reads_only_that_one_is_refused() -> None:
    config = stated(("f",), False)
    inner = {key: value for key, value in config.raw["dflash_config"].items() if key != "block_size"}
    older = Stated(config.raw | {"dflash_config": inner})
    older.block_size = 8
    refused = {name for name, engine in SERVING_ENGINES.items() if engine.refusal(older)}
    assert refused == {"lmdeploy"}


def test_causality_is_read_as_vllm_reads_it() -> None:
    raw = stated(("s", "f"), None).raw
    assert [layer.is_causal for layer in layers(raw, TRAINED)] == [True, False]
    assert [layer.is_causal for layer in layers(raw | {"dflash_config": {"causal": True}}, TRAINED)] == [True, True]
    both = raw | {"is_causal": False, "dflash_config": {"causal": True}}
    assert [layer.is_causal for layer in layers(both, TRAINED)] == [False, False]


@pytest.mark.parametrize("name", list(SERVING_ENGINES))
def test_a_command_is_shell_that_names_target_and_draft(name: str) -> None:
    config = stated(("f",), False)
    text = SERVING_ENGINES[name].command("Org/Target model", "a draft", config)
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    assert {"Org/Target model", "a draft"} <= set(words) or name in ("vllm", "trtllm", "llamacpp")
    if name == "vllm":
        settings = json.loads(words[words.index("--speculative-config") + 1])
        assert settings == {"method": "dflash", "model": "a draft", "num_speculative_tokens": 7}
    if name == "sglang":
        assert words[words.index("--speculative-num-draft-tokens") + 1] == "8"
    if name == "lmdeploy":
        assert words[words.index("--speculative-num-draft-tokens") + 1] == "7"
    if name == "llamacpp":
        assert words[words.index("--spec-draft-n-max") + 1] == "7"
        assert words[words.index("--spec-type") + 1] == "draft-dflash"
    if name == "trtllm":
        settings = yaml.safe_load(text.split("'YAML'\n")[1].split("\nYAML\n")[0])["speculative_config"]
        assert settings == {"decoding_type": "DFlash", "speculative_model": "a draft", "max_draft_len": 7}


def test_mixed_layers_and_candidates_need_the_newer_runner_of_vllm() -> None:
    assert serving.VLLM.note(stated(("f", "f"), False).raw) is None
    for config in (stated(("s", "f"), None), stated(("f", "f"), False, "DFlash2DraftModel")):
        assert "VLLM_USE_V2_MODEL_RUNNER=1" in (serving.VLLM.note(config.raw) or "")


@pytest.mark.parametrize("case", DECODES)
def test_our_reading_is_that_of_the_drafts_themselves(case: str) -> None:
    kinds, is_causal, *_ = DECODES[case]
    target: Any = empty_target(TINY).config
    settings = Draft(
        num_hidden_layers=2, layer_types=[KINDS[kind] for kind in kinds], causal=is_causal,
        num_target_layers_tapped=3, sliding_window=16 if "s" in kinds else None,
    )  # fmt: skip
    config = DRAFTS["dflash"].config_for(target, settings, block_size=8, mask_token_id=3)
    assert layers(config.to_json(), TRAINED) == [config.layer_attention(index) for index in range(2)]
