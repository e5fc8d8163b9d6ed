"""Whether a target can be read as its authors meant it, told from its config.json before its weights are read."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from dllm.config.params import Target
from dllm.errors import ModelError
from dllm.models.config_keys import refuse_unknown


def check_config(target: Target, directory: Path) -> dict[str, Any]:
    """Refuse a config that transformers would read only in part; return its content.

    The code that builds the model is searched for every key: a key that it never names has no effect there, though it
    may have been meant to have one. A model that runs its own code reads its config itself.

    Raises:
        ModelError: config.json is missing or broken, transformers knows no such causal model, or a key is unknown.
    """
    from dllm.models.diffusion.families import family_of  # torch, which locating a target does without

    raw = read_config(directory)
    own_keys = family_of(raw).config_keys
    if (target.trust_remote_code and raw.get("auto_map")) or own_keys is None:
        return raw
    words = _words_of(raw.get("model_type"), raw, directory) | own_keys
    refuse_unknown(raw, words, str(directory / "config.json"))
    text = raw.get("text_config")
    if isinstance(text, dict):
        refuse_unknown(text, words, str(directory / "config.json"), "text_config")
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


def _words_of(model_type: Any, raw: dict[str, Any], directory: Path) -> set[str]:
    """Return every word in the code by which transformers reads and builds such a model."""
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
    files = [inspect.getsourcefile(each) for each in (config_class, model_class)]
    files += [configuration_utils.__file__, modeling_rope_utils.__file__]
    text = "\n".join(Path(file).read_text() for file in files if file is not None)
    return set(re.findall(r"\w+", text)) | set(config_class.attribute_map)
