"""Whether a target can be read as its authors meant it, told from its config.json before its weights are read."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dllm.config.params import Target
from dllm.errors import ModelError
from dllm.models.config_keys import refuse_unknown
from dllm.models.published_keys import passed_over
from dllm.outside import one_line

ROPE_SECTIONS = ("rope_parameters", "rope_scaling")
SOFTCAP = "final_logit_softcapping"
LOGIT_SWITCHES = {"logits_scaling": 1, "logit_scale": 1, "lm_head_multiplier": 1, SOFTCAP: 0, "lm_head_bias": 0}
"""Keys by which logits differ from hidden states times the weight of the head, each with the value that changes none.

One key scales in one model and divides in another, so that none of them is applied here."""


def check_config(target: Target, directory: Path) -> dict[str, Any]:
    """Refuse a config that transformers would read only in part; return its content.

    The code that builds the model is searched for every key: a key that it never names has no effect there, though it
    may have been meant to have one, unless `published_keys` knows better. A model that runs its own code reads its
    config itself.

    Raises:
        ModelError: config.json is missing or broken, transformers knows no such causal model, a key is unknown, or
            what reads its quantized weights is not installed.
    """
    from dllm.models.diffusion.families import family_of  # torch, which locating a target does without

    raw, where = read_config(directory), str(directory / "config.json")
    if target.trust_remote_code and raw.get("auto_map"):
        return raw
    family = family_of(raw)
    if family.config_keys is None:
        family.check_config(raw, where)
        return raw
    own, shared = _words_of(raw.get("model_type"), raw, directory)
    words = own | shared | family.config_keys
    text = raw.get("text_config")
    for inside, section in (("", raw), ("text_config", text)):
        if isinstance(section, dict):
            kind = section.get("model_type", raw["model_type"])
            refuse_unknown(section, words | passed_over(section, str(kind)), where, inside)
            _check_rope(section, own, words, where)
    _check_quantizer(raw, where)
    return raw


def read_config(directory: Path) -> dict[str, Any]:
    """Read a model's config.json.

    Raises:
        ModelError: it is missing, not JSON, or no JSON object.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise ModelError(f"cannot read the model's config: {said}", where=str(path)) from None
    if not isinstance(raw, dict):
        raise ModelError("cannot read the model's config: it is no JSON object", where=str(path))
    return raw


def built_config(target: Target, directory: Path) -> Any:
    """Return transformers' config of a model.

    Raises:
        ModelError: a value is impossible, or of a wrong type.
    """
    from transformers import AutoConfig

    from dllm.models.quiet import without_warnings

    try:
        with without_warnings():
            config = AutoConfig.from_pretrained(directory, trust_remote_code=target.trust_remote_code)
        if getattr(config.get_text_config(), "num_hidden_layers", 1) < 1:
            raise ValueError("num_hidden_layers is below 1")
        return config
    except Exception as error:  # any value may be of any type, and each class checks its own
        raise not_built(target, directory, error, "cannot read the model's config") from error


def logit_switch(config: Any, *applied: str) -> str | None:
    """Name the key by which a target's logits are not its head's product, as KEY: VALUE; None where they are.

    Args:
        config: the target's, as transformers builds it.
        applied: keys that the caller applies itself.
    """
    config = config.get_text_config()
    values = {key: getattr(config, key, None) for key in LOGIT_SWITCHES if key not in applied}
    changed = [key for key, value in values.items() if value is not None and value != LOGIT_SWITCHES[key]]
    return f"{changed[0]}: {values[changed[0]]}" if changed else None


def check_logits(target: Target, directory: Path, what: str, *applied: str) -> None:
    """Refuse, by its config, a target whose logits are not its head's product, for what computes them so.

    Args:
        what: names what computes them, in the error.
        applied: keys that it applies itself.

    Raises:
        ModelError: a key changes the logits.
    """
    try:
        config = built_config(target, directory)
    except ModelError:  # transformers does not know it; whoever loads it says so
        return
    if switch := logit_switch(config, *applied):
        raise ModelError(f"its config has {switch}, which {what} does not apply", where=str(directory / "config.json"))


def not_built(target: Target, directory: Path, error: Exception, what: str) -> ModelError:
    """Return the error for a model that transformers, or the model's own code, does not build."""
    import transformers

    told = f"{type(error).__name__}: {one_line(str(error), 250)}"
    if target.trust_remote_code and any(directory.glob("*.py")):
        what = f"the model's own code fails with transformers {transformers.__version__}"
    return ModelError(f"{what} ({told})", where=str(directory))


def _check_rope(section: Mapping[str, Any], own: set[str], words: set[str], where: str) -> None:
    """Refuse rotary embeddings that the model's code does not compute as its config says.

    Args:
        own: words in the model's own code; its default embedding is there, the others are shared.
        words: all that are known.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = [(name, inner) for name in ROPE_SECTIONS for inner in _mappings(section.get(name))]
    kinds = set()
    for name, inner in found:
        refuse_unknown(inner, words, where, name)
        kind = inner.get("rope_type", inner.get("type", "default"))
        if not isinstance(kind, str) or not (kind == "default" or kind in ROPE_INIT_FUNCTIONS or kind in own):
            raise ModelError(f"its config has {name} of the type {kind!r}, which is not supported", where=where)
        kinds.add(kind)
    part = [each.get("partial_rotary_factor") for each in (section, *(inner for _, inner in found))]
    if "partial_rotary_factor" not in own and not kinds - {"default"} and not set(map(repr, part)) <= {"None", "1.0"}:
        raise ModelError("its config has partial_rotary_factor, which its model's code does not read", where=where)


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of rotary embeddings: one for all layers, or one for each kind of layer."""
    if isinstance(value, Mapping):
        inner = [each for each in value.values() if isinstance(each, Mapping)]
        yield from inner or [value]


def _check_quantizer(raw: Mapping[str, Any], where: str) -> None:
    from transformers.quantizers.auto import AutoHfQuantizer

    from dllm.models.quiet import without_warnings

    settings = raw.get("quantization_config")
    if not settings:
        return
    kind = settings.get("quant_method") if isinstance(settings, dict) else None
    try:
        with without_warnings():
            AutoHfQuantizer.from_config(dict(settings), pre_quantized=True).validate_environment(weights_only=True)
    except RuntimeError:  # this machine lacks the device; the one that loads the weights may have it
        return
    except ImportError as error:
        what = f"its weights are quantized ({kind}): {one_line(str(error), 200)}"
        raise ModelError(what, where=where, hint="or take the model without quantization") from None
    except Exception as error:  # of any quantizer
        what = f"its quantization_config ({kind}) cannot be read: {one_line(str(error), 200)}"
        raise ModelError(what, where=where) from None


def _words_of(model_type: Any, raw: dict[str, Any], directory: Path) -> tuple[set[str], set[str]]:
    """Return every word in the code of such a model and its config, and in what they share with others."""
    import transformers
    from transformers import CONFIG_MAPPING, configuration_utils, modeling_rope_utils
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    where = str(directory / "config.json")
    if not isinstance(model_type, str):
        raise ModelError("its config has no model_type", where=where)
    config_class: Any = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401
    if config_class is None or config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if raw.get("auto_map"):
            raise ModelError(
                f"a model of type {model_type!r} runs code of its own",
                where=where,
                hint="read it, then set target.trust_remote_code, or give --trust-remote-code",
            )
        raise ModelError(
            f"transformers {transformers.__version__} has no causal model of type {model_type!r}", where=where
        )
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    own = [inspect.getsourcefile(each) for each in (config_class, model_class)]
    shared = [configuration_utils.__file__, modeling_rope_utils.__file__]
    words = [
        set(re.findall(r"\w+", "\n".join(Path(file).read_text() for file in files if file))) for files in (own, shared)
    ]
    return words[0] | set(config_class.attribute_map), words[1]
