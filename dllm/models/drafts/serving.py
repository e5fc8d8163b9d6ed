"""What serving engines read in a draft's config.json, what each of them cannot decode, and how each is started.

Engines name no standard: where one reads the block size, and whether a window makes a layer causal, differs, and most
guess in silence where a key is missing. An engine is an entry here and one line of `dllm.registry.SERVING_ENGINES`. Its
reading of a draft is compared with what was trained, so that a draft that it would decode otherwise is refused.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dllm.errors import ModelError
from dllm.models.drafts.config import SLIDING
from dllm.models.drafts.protocol import DraftConfig
from dllm.registry import SERVING_ENGINES

NESTED_FIRST = {name: (f"dflash_config.{name}", name) for name in ("block_size", "mask_token_id", "target_layer_ids")}
CANDIDATES = tuple(
    f"dflash_config.{name}" for name in ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
)
"""What DFlash 2 adds to a config.json."""


class Attention(NamedTuple):
    """The attention of one draft layer."""

    window: int | None
    """Context window; None attends to the whole context."""
    is_causal: bool
    """Whether a slot of a block attends to the slots up to itself only."""

    def __str__(self) -> str:
        order = "causal" if self.is_causal else "bidirectional"
        return f"{order} attention" + ("" if self.window is None else f" in a window of {self.window}")


@dataclass(frozen=True)
class Causality:
    """How causality inside a block is read."""

    keys: tuple[str, ...] = ()
    """Keys that hold it for all layers, the first that is set winning."""
    windows_are_causal: bool = True
    """Of a layer with a window, where no key is set; a layer without one is then bidirectional."""

    def of(self, raw: Mapping[str, Any], has_window: bool) -> bool:
        """Read the causality of a layer."""
        found = next((value for key in self.keys if (value := lookup(raw, key)) is not None), None)
        return bool(found) if found is not None else has_window and self.windows_are_causal


TRAINED = Causality(("is_causal", "dflash_config.causal"))
"""How we read a config.json, and so what a draft was trained with: vLLM's rule."""


@dataclass(frozen=True)
class ServingEngine:
    """One engine, by the version whose code was read."""

    title: str
    decodes: Mapping[str, Causality]
    """Draft architectures that it has, each with how it reads causality."""
    command: Callable[[str, str, DraftConfig], str]
    """Shell lines that start it: takes target, draft and the draft's config."""
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: NESTED_FIRST)
    """Keys that it reads, by the name of the value: in this order, at least one of which must be there."""
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"DFlash2DraftModel": CANDIDATES})
    """Further keys that it cannot do without, by architecture."""
    attention: Callable[[Attention], bool] = lambda layer: True
    """Whether it has kernels for an attention."""
    limit: Callable[[Mapping[str, Any]], str | None] = lambda raw: None
    """A further limit that a config exceeds, as the end of the sentence "the engine ..."."""
    note: Callable[[Mapping[str, Any]], str | None] = lambda raw: None
    """A sentence on what else is to be done to serve such a config."""

    def refusal(self, config: DraftConfig) -> str | None:
        """Say in one sentence why the engine cannot decode a draft as it was trained; None if it can."""
        raw = config.to_json()
        name = raw["architectures"][0]
        if name not in self.decodes:
            return f"{self.title} has no {name}"
        for key in (*self.needs.get(name, ()), "layer_types"):
            if lookup(raw, key) is None:
                return f"{self.title} needs {key}, which the draft's config has not"
        for value, keys in self.reads.items():
            read, trained = (next(filter(_is_set, (lookup(raw, key) for key in keys)), None), getattr(config, value))
            if read is None or read != (list(trained) if isinstance(trained, tuple) else trained):
                return f"{self.title} reads {value} from {' or '.join(keys)}: {read}, and the draft has {trained}"
        for index, (trained, read) in enumerate(
            zip(layers(raw, TRAINED), layers(raw, self.decodes[name]), strict=True)
        ):
            if read != trained:
                return f"{self.title} would decode layer {index} with {read}, and it was trained with {trained}"
            if not self.attention(trained):
                return f"{self.title} has no {trained}, as in layer {index}"
        over = self.limit(raw)
        return None if over is None else f"{self.title} {over}"


def layers(raw: Mapping[str, Any], causality: Causality) -> list[Attention]:
    """Read the attention of each layer by a rule of causality."""
    windows = [raw.get("sliding_window") if kind == SLIDING else None for kind in raw.get("layer_types") or []]
    return [Attention(window, causality.of(raw, window is not None)) for window in windows]


def lookup(raw: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key, which may be dotted; None where it is missing."""
    value: Any = raw
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def refusals(config: DraftConfig) -> dict[str, str]:
    """Map each engine that cannot decode a draft as it was trained to the reason."""
    found = {name: engine.refusal(config) for name, engine in SERVING_ENGINES.items()}
    return {name: why for name, why in found.items() if why is not None}


def require(engine_name: str, config: DraftConfig, where: str) -> ServingEngine:
    """Return an engine that decodes a draft as it was trained.

    Raises:
        ConfigError: no engine has that name.
        ModelError: the engine cannot decode the draft; the line says why.
    """
    engine: ServingEngine = SERVING_ENGINES[engine_name]
    if (why := engine.refusal(config)) is not None:
        able = [name for name in SERVING_ENGINES if name not in refusals(config)]
        raise ModelError(why, where=where, hint=f"engines that can: {', '.join(able)}" if able else None)
    return engine


def _is_set(value: Any) -> bool:
    return value is not None


def _shell(*words: str) -> str:
    """Join words into one command, an option and its values per line."""
    lines = [shlex.quote(words[0])]
    for word in words[1:]:
        if word.startswith("-") and not word.startswith("-m"):
            lines.append(f"  {shlex.quote(word)}")
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(lines)


def _sglang(target: str, draft: str, config: DraftConfig) -> str:
    return _shell(
        "python", "-m", "sglang.launch_server", "--model-path", target, "--speculative-algorithm", "DFLASH",
        "--speculative-draft-model-path", draft, "--speculative-num-draft-tokens", str(config.block_size),
    )  # fmt: skip


def _vllm(target: str, draft: str, config: DraftConfig) -> str:
    speculation = {"method": "dflash", "model": draft, "num_speculative_tokens": config.block_size - 1}
    return _shell("vllm", "serve", target, "--speculative-config", json.dumps(speculation))


def _lmdeploy(target: str, draft: str, config: DraftConfig) -> str:
    return _shell(
        "lmdeploy", "serve", "api_server", target, "--backend", "pytorch", "--speculative-algorithm", "dflash",
        "--speculative-draft-model", draft, "--speculative-num-draft-tokens", str(config.block_size - 1),
    )  # fmt: skip


def _trtllm(target: str, draft: str, config: DraftConfig) -> str:
    settings = {
        "decoding_type": "DFlash",
        "speculative_model": draft,
        "max_draft_len": config.block_size - 1,
    }
    lines = ["speculative_config:", *(f"  {key}: {json.dumps(value)}" for key, value in settings.items())]
    serve = _shell("trtllm-serve", target, "--config", "dflash.yaml")
    return "\n".join(["cat > dflash.yaml <<'YAML'", *lines, "YAML", serve])


def _llamacpp(target: str, draft: str, config: DraftConfig) -> str:
    convert = _shell(
        "python", "convert_hf_to_gguf.py", draft, "--outtype", "bf16", "--target-model-dir", "TARGET_FOLDER",
        "--outfile", "draft.gguf",
    )  # fmt: skip
    serve = _shell(
        "llama-server", "--model", "target.gguf", "--spec-draft-model", "draft.gguf", "--spec-type", "draft-dflash",
        "--spec-draft-n-max", str(config.block_size - 1),
    )  # fmt: skip
    return f"{convert}\n{serve}"


def _zlab(target: str, draft: str, config: DraftConfig) -> str:
    return _shell(
        "dflash", "generate", "transformers", "--model", target, "--draft", draft,
        "How many positive whole-number divisors does 196 have?",
    )  # fmt: skip


def _is_mixed(raw: Mapping[str, Any]) -> bool:
    return len(set(raw["layer_types"])) > 1


def _vllm_runner(raw: Mapping[str, Any]) -> str | None:
    why = "has one kind of layer per draft" if _is_mixed(raw) else None
    if raw["architectures"][0] == "DFlash2DraftModel":
        why = "walks no candidates"
    return why and f"Set VLLM_USE_V2_MODEL_RUNNER=1 in its environment: the older runner {why}."


def _exceeds_llamacpp(raw: Mapping[str, Any]) -> str | None:
    if raw.get("attention_bias"):
        return "has no biases in the attention of a draft"
    candidates = lookup(raw, "dflash_config.selector_top_k") or 0
    width = candidates * (candidates + 1)  # the scores of a slot's candidates lie in one row of the hidden size
    return None if raw["hidden_size"] >= width else f"needs a hidden size of {width} for {candidates} candidates"


SGLANG = ServingEngine(
    title="SGLang 0.5.23",
    decodes=dict.fromkeys(("DFlashDraftModel", "DFlash2DraftModel"), Causality(("is_causal",))),
    command=_sglang,
)

VLLM = ServingEngine(
    title="vLLM 0.33",
    decodes=dict.fromkeys(("DFlashDraftModel", "DFlash2DraftModel"), Causality(("is_causal", "dflash_config.causal"))),
    command=_vllm,
    reads={name: keys for name, keys in NESTED_FIRST.items() if name != "block_size"},  # the command names it
    note=lambda raw: _vllm_runner(raw),
)

LMDEPLOY = ServingEngine(
    title="LMDeploy 0.18",
    decodes={"DFlashDraftModel": Causality(("dflash_config.causal", "causal"))},
    command=_lmdeploy,
    reads={
        "block_size": ("dflash_config.block_size",),
        "mask_token_id": ("dflash_config.mask_token_id", "mask_token_id"),
        "target_layer_ids": ("dflash_config.target_layer_ids",),
    },
    needs={"DFlashDraftModel": ("num_target_layers",)},
    attention=lambda layer: layer.is_causal is (layer.window is not None),
)

TRTLLM = ServingEngine(
    title="TensorRT-LLM 1.4",
    decodes={"DFlashDraftModel": Causality(), "DFlash2DraftModel": Causality(("is_causal",))},
    command=_trtllm,
    limit=lambda raw: (
        "ignores windows unless use_sliding_window is true"
        if SLIDING in raw["layer_types"] and raw.get("use_sliding_window") is not True
        else None
    ),
)

LLAMACPP = ServingEngine(
    title="llama.cpp",
    decodes=dict.fromkeys(("DFlashDraftModel", "DFlash2DraftModel"), Causality(windows_are_causal=False)),
    command=_llamacpp,
    limit=_exceeds_llamacpp,
    note=lambda raw: "TARGET_FOLDER is the target as a Hugging Face folder, target.gguf the same converted.",
)

ZLAB = ServingEngine(
    title="dflash 0.1.0",
    decodes=dict.fromkeys(("DFlashDraftModel", "DFlash2DraftModel"), Causality(("is_causal",))),
    command=_zlab,
    # It computes the layers to tap from the target's depth even where they are listed.
    needs={"DFlashDraftModel": ("num_target_layers",), "DFlash2DraftModel": (*CANDIDATES, "num_target_layers")},
)
