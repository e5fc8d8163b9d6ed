"""Whether a target's directory has all files of a model, and is no adapter; whether it can have a revision."""

from __future__ import annotations

import json
from pathlib import Path

from dllm.config.params import Target
from dllm.errors import ConfigError, ModelError
from dllm.models import builtin

ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"


def check_directory(directory: Path) -> None:
    """Refuse a directory without config.json.

    Raises:
        ModelError: it is missing; an adapter is told apart.
    """
    if (directory / "config.json").is_file():
        return
    what, hint = "no config.json in the target's directory", "point target.model at a saved model"
    if (directory / ADAPTER).is_file():
        what = f"the target's directory holds an adapter ({ADAPTER}), and no model"
        hint = "merge it into its base model (merge_and_unload of peft), and point target.model at what is saved then"
    raise ModelError(what, where=str(directory), hint=hint)


def check_shards(directory: Path) -> None:
    """Refuse a directory that lacks files which the index of its weights names; one without an index passes.

    Raises:
        ModelError: a file is missing, or the index cannot be read.
    """
    index = directory / INDEX
    if not index.is_file():
        return
    try:
        files = sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ModelError("cannot read the index of the target's weights", where=str(index)) from None
    if missing := [name for name in files if not (directory / name).is_file()]:
        what = f"{len(missing)} of {len(files)} files of the target's weights are missing, {missing[0]} the first"
        raise ModelError(what, where=str(index), hint="copy or download the model again")


def check_revision(target: Target) -> None:
    """Refuse a revision of a built-in model or a directory, which have none.

    Raises:
        ConfigError: one is given.
    """
    if target.revision is None:
        return
    if target.model.startswith(builtin.PREFIX) or Path(target.model).expanduser().is_dir():
        what = "a directory has no revision" if not target.model.startswith(builtin.PREFIX) else "it has no revision"
        raise ConfigError(what, where=f"target.revision: {target.revision}", hint="it is for models off the hub")
