"""The frozen target: finding its files, and loading them.

Owns the way from `target.model` in params.yaml to a directory and a model in evaluation mode. Hub models are taken as a
snapshot first, so that all later reads see one revision.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.config.params import Target
from dllm.errors import ConfigError, ModelError
from dllm.models import builtin, hub
from dllm.models.quiet import without_warnings
from dllm.models.target_config import built_config, check_config, not_built, read_config
from dllm.models.target_files import check_directory
from dllm.outside import one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def locate(target: Target, *, weights: bool = True) -> Path:
    """Return the target's directory, created or downloaded on first use.

    Args:
        target: its name, revision and trust.
        weights: download them too.

    Raises:
        ModelError: there is no such built-in, directory or hub repository, or the hub is out of reach.
        ConfigError: the hub's code is to be run, and no commit is pinned.
    """
    if target.model.startswith(builtin.PREFIX):
        return builtin.directory(target.model)
    path = Path(target.model).expanduser()
    if path.is_dir():
        check_directory(path)
        return path
    if not hub.looks_like_id(target.model):
        raise ModelError("no such model directory", where=f"target.model: {target.model}")
    patterns = hub.FILES if weights else hub.CONFIG_FILES
    if target.trust_remote_code:
        patterns = [*patterns, "*.py"]
        if re.fullmatch("[0-9a-f]{40}", target.revision or "") is None:
            raise ConfigError(
                "code from the hub is run only at a pinned commit, and a branch or tag may move",
                where=f"target.revision: {target.revision}",
                hint="give the 40 digits of the commit whose code you have read (`--revision` for generate)",
            )
    path = hub.snapshot(target.model, target.revision, patterns, where="target.model")
    check_directory(path)
    return path


# torch and the model classes of transformers take 1 to 3 seconds to import: location does without them.


def load_tokenizer(target: Target) -> PreTrainedTokenizerBase:
    """Load the target's tokenizer; no weights are downloaded.

    Raises:
        ModelError: the target has no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    path = locate(target, weights=False)
    try:
        with without_warnings():  # of a config whose model has code of its own
            return AutoTokenizer.from_pretrained(path, trust_remote_code=target.trust_remote_code)
    except Exception as error:  # its files hold anything, and each kind of tokenizer has a reader of its own
        what = f"cannot read the tokenizer: {one_line(str(error), 250)}"
        raise ModelError(what, where=str(path)) from error


def check_vocabulary(target: Target, tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> None:
    """Refuse a tokenizer with tokens that have no row in the target's embedding; added ones may, while none is used.

    Args:
        ids: of a rendered prompt.

    Raises:
        ModelError: there is such a token.
    """
    path = locate(target, weights=False)
    raw = read_config(path)
    text = raw.get("text_config") or raw
    rows = text.get("embedding_size") or text.get("vocab_size")
    last = max(tokenizer.vocab_size - 1, *ids)
    if isinstance(rows, int) and last >= rows:
        token = one_line(str(tokenizer.convert_ids_to_tokens(last)), 60)
        what = f"the tokenizer has token {last} ({token}), and the embedding {rows} rows"
        raise ModelError(what, where=str(path), hint="the tokenizer is another model's, or rows were not added for it")


def load_target(
    target: Target,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Load the target frozen and in evaluation mode on `device` (else the best one).

    Args:
        target: its name, revision and dtype.
        dtype: of its weights; by default what the device computes in where `target.dtype` is asked for.
        device: where to.

    Raises:
        ModelError: the directory holds no causal model that can be read, or its own code does not load here.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    from dllm.models.diffusion import llada, older_code
    from dllm.models.precision import compute_dtype

    logging.disable_progress_bar()  # its bars would cut through a stage's own
    path = locate(target)
    hub.check_blobs(path, weights=True)
    device = best_device() if device is None else device
    if dtype is None:
        dtype = compute_dtype(target.dtype, device)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    read: Any = AutoModelForCausalLM.from_pretrained
    asked: dict[str, Any] = {"dtype": dtype, "trust_remote_code": target.trust_remote_code, "use_safetensors": True}
    own: dict[str, str] = {}
    check_config(target, path)
    try:
        if not target.trust_remote_code and llada.is_llada(path):
            model, report = llada.load(path, asked["dtype"])
            return _ready(model, report, path, device)
        config = built_config(target, path)
        if target.trust_remote_code:
            own = getattr(config, "auto_map", None) or {}
        kind = next((name for name in ("AutoModelForCausalLM", "AutoModel") if name in own), None)
        if kind is not None:
            older_code.prepare(own[kind], path)
        if kind == "AutoModel":  # as Nemotron-Labs-Diffusion's
            read = AutoModel.from_pretrained
        with without_warnings():  # of what the report has
            model, report = read(path, output_loading_info=True, ignore_mismatched_sizes=True, **asked)
        if kind is not None:
            older_code.settle(model)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot read the target: {_first_line(error)}", where=str(path)) from None
    except (ImportError, AttributeError, TypeError, LookupError) as error:
        raise not_built(target, path, error, "cannot build the target") from error
    if kind is None:
        _check_unread(model, report, path)
    return _ready(model, report, path, device)


def empty_target(target: Target) -> PreTrainedModel:
    """Build the target on the meta device: its modules and shapes, from its config alone.

    Raises:
        ModelError: transformers knows no such causal model, or its config has a key that is not supported.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = locate(target, weights=False)
    check_config(target, path)
    config = built_config(target, path)
    try:
        with torch.device("meta"), without_warnings():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=target.trust_remote_code
            )
    except Exception as error:  # sizes that do not fit each other fail anywhere
        raise not_built(target, path, error, "cannot build the target") from error
    return model


def _check_unread(model: Any, report: Mapping[str, Any], path: Path) -> None:
    """Refuse weights that the config leaves out: layers beyond its number, biases and scales that it does not name.

    Other tensors that are not read, such as buffers of older versions or whole parts beside the text model, pass.
    """
    places = {re.sub(r"\d+", "#", name.rpartition(".")[0]) for name, _ in model.named_parameters()}
    unread = sorted(key for key in report["unexpected_keys"] if re.sub(r"\d+", "#", key.rpartition(".")[0]) in places)
    if unread:
        what = f"its config leaves out {len(unread)} tensors of the target, {unread[0]} among them"
        raise ModelError(what, where=str(path), hint="check the numbers of layers and the switches in config.json")


def _ready(model: Any, report: Mapping[str, Any], path: Path, device: torch.device | str) -> PreTrainedModel:
    if wrong := sorted(report["mismatched_keys"]):
        name, stored, expected = wrong[0]
        what = f"{len(wrong)} tensors of the target are not as its config says: {name} is {tuple(stored)}"
        raise ModelError(f"{what}, expected {tuple(expected)}", where=str(path))
    if missing := sorted(report["missing_keys"]):  # transformers would draw them at random
        raise ModelError(f"the target lacks {len(missing)} tensors, {missing[0]} among them", where=str(path))
    ready: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    _check_finite(ready, path)
    return ready


def _check_finite(model: PreTrainedModel, path: Path) -> None:
    """Refuse weights with NaN or infinite values: every response, feature and loss would be made of them."""
    bad = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
    if bad:
        what = f"{len(bad)} tensors of the target hold values that are not finite in {model.dtype}, {bad[0]} among them"
        hint = "the file is damaged, its training has diverged, or target.dtype has too small a range"
        raise ModelError(what.replace("torch.", ""), where=str(path), hint=hint)


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinite value: one pass over it that takes no memory."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    # Of the types of one byte torch finds no extremes.
    extremes = (tensor.float() if tensor.element_size() == 1 else tensor.detach()).aminmax()
    return all(bool(each.isfinite()) for each in extremes)


def best_device() -> torch.device:
    """Return this rank's GPU, else the CPU."""
    import torch

    if torch.cuda.is_available():
        is_rank = "WORLD_SIZE" in os.environ  # else LOCAL_RANK is left over in a shell
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if is_rank else 0)
    return torch.device("cpu")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
