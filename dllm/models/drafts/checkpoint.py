"""A draft on disk, in the form of published drafts: config.json and model.safetensors.

Owns the check that a checkpoint holds exactly the tensors of its family, finite and in the shapes of its config.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllm.errors import ConfigError, ModelError
from dllm.files import atomic_path, atomic_write
from dllm.models import hub
from dllm.models.drafts.foreign import describe_tensors, foreign_family
from dllm.models.drafts.protocol import Draft, DraftConfig
from dllm.models.target_identity import weights_digest
from dllm.registry import DRAFTS
from dllm.tracking.runs import REGISTERED

WEIGHTS, CONFIG = "model.safetensors", "config.json"
SHARED = ("embed_tokens.weight", "lm_head.weight")
"""Tensors that some published drafts carry, though a draft reads the target's."""
ALIASES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
"""Other published names of a draft's tensors."""
MASK_EMBEDDING = "mask_embedding.pt"
"""A file with an embedding of the draft's own for its masks, pickled."""
FLOATS = {"F64": torch.float32, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes in a file's header, and those that the weights are written in again."""


class Stored(NamedTuple):
    """Where a tensor is stored."""

    file: Path
    name: str
    """Its name there."""
    shape: tuple[int, ...]
    dtype: str
    """As the header has it: BF16, F32."""


def save_draft(draft: Draft, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write a draft into a directory; each file is written atomically.

    Args:
        draft: what to write.
        directory: created if it does not exist.
        dtype: of the weights on disk; None keeps the draft's own.

    Raises:
        ModelError: a tensor is missing, extra, of the wrong shape, or not finite in that dtype.
    """
    state = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in draft.state_dict().items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _check(shapes, type(draft).tensor_shapes(draft.config), str(directory))
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise ModelError(f"weights are not finite: {_some(bad)}", where=str(directory), hint="lower the learning rate")
    config = draft.config.to_json() | {"dtype": str(next(iter(state.values())).dtype).removeprefix("torch.")}
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_path(directory / WEIGHTS) as aside:
        save_file(state, aside, metadata={"format": "pt"})
    atomic_write(directory / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_draft(source: str | Path, target_config: Any = None, revision: str | None = None) -> Draft:
    """Load a draft with float32 weights from a directory or a Hugging Face id, and check that it fits its target.

    Args:
        source: as in `draft_directory`.
        target_config: the target's transformers config; None skips the check of fit.
        revision: of the hub's repository; None takes the newest.

    Raises:
        ModelError: the draft is missing, incomplete, unreadable, of no known family, or made for another target.
    """
    directory = draft_directory(source, revision, weights=True)
    family, config = read_config(directory)
    if target_config is not None:
        check_fit(config, target_config, str(directory))
    state = _read(check_tensors(directory, family, config))
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ModelError(f"weights are not finite: {_some(bad)}", where=str(directory), hint="the file is damaged")
    draft = family(config)
    draft.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return draft


def stored_dtype(directory: Path) -> torch.dtype:
    """Return the dtype of a draft's weights, by the headers of its files; float32 where they differ.

    Raises:
        ModelError: there are no weights, or one is of another dtype.
    """
    dtypes = {FLOATS[each.dtype] for each in _stored(directory).values()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def draft_directory(source: str | Path, revision: str | None = None, *, weights: bool = False) -> Path:
    """Return a draft's directory, fetched from the Hugging Face hub or MLflow on first use.

    Args:
        source: a directory, `models:/NAME@ALIAS` or `models:/NAME/VERSION` of the project in this directory, or a
            Hugging Face id.
        revision: of the hub's repository.
        weights: fetch them from the hub too.

    Raises:
        ModelError: there is none, or not at that revision.
        ConfigError: a revision is given for what is not on the hub.
    """
    if str(source).startswith(REGISTERED):
        from dllm.models import checkpoints  # it identifies drafts by this module

        if revision is not None:
            hint = "name it as models:/NAME/VERSION"
            raise ConfigError("a registered draft has a version, no revision", where=str(source), hint=hint)
        return checkpoints.resolve(str(source), Path.cwd())
    directory = Path(source).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise ConfigError("a directory has no revision", where=str(source), hint="it is for drafts off the hub")
        return directory
    if not hub.looks_like_id(str(source)):
        raise ModelError("no such draft directory", where=str(source))
    patterns = ["*.json", MASK_EMBEDDING, *(["*.safetensors"] if weights else [])]
    directory = hub.snapshot(str(source), revision, patterns, where="draft")
    hub.check_blobs(directory, weights=True)
    return directory


def draft_identity(source: str, revision: str | None = None) -> dict[str, Any]:
    """Return a draft's identity: name, hub commit (None if not from the hub), hash of config and weights."""
    directory = draft_directory(source, revision, weights=True)
    return {"model": source, "revision": hub.commit_of(directory), "weights": weights_digest(directory)}


def family_of(raw: Mapping[str, Any]) -> type[Draft] | None:
    """Find the draft family that reads a config.json; None if it is no draft that we know."""
    return next((family for _, family in DRAFTS.items() if family.reads(raw)), None)


def read_config(directory: Path) -> tuple[type[Draft], DraftConfig]:
    """Read a draft's config.json; return its family and its config.

    Raises:
        ModelError: it is missing, not JSON, or no draft's.
    """
    path = directory / CONFIG
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError("no draft here: config.json is missing", where=str(directory)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read the draft's config: {error}", where=str(path)) from None
    if not isinstance(raw, dict):
        raise ModelError("cannot read the draft's config: it is no JSON object", where=str(path))
    family = family_of(raw)
    if (family is None or "speculators_model_type" in raw) and (other := foreign_family(raw)):
        raise ModelError(f"this is a draft of {other}", where=str(path))
    if family is None:
        names = raw.get("architectures") or ["none"]
        named = ", ".join(map(str, names if isinstance(names, list) else [names]))
        known = ", ".join(family.architectures[0] for _, family in DRAFTS.items())
        raise ModelError(f"not a draft that we read: its architecture is {named}, ours: {known}", where=str(path))
    return family, family.read_config(raw, str(path))


def check_fit(config: DraftConfig, target_config: Any, where: str) -> None:
    """Check that a draft fits a target's features, embedding and head.

    Raises:
        ModelError: width, vocabulary, layers or mask id do not fit.
    """
    target = target_config.get_text_config()
    pairs = {
        "hidden_size": (config.hidden_size, target.hidden_size),
        "vocab_size": (config.vocab_size, target.vocab_size),
    }
    for name, (drafts, targets) in pairs.items():
        if drafts != targets:
            raise ModelError(
                f"the draft is for another target: {name} {drafts}, the target's is {targets}", where=where
            )
    if max(config.target_layer_ids) >= target.num_hidden_layers:
        raise ModelError(
            f"the draft taps layer {max(config.target_layer_ids)} of a target with {target.num_hidden_layers}",
            where=where,
        )
    depth = getattr(config, "num_target_layers", None)  # not every family, nor every file, records it
    if depth not in (None, target.num_hidden_layers):
        raise ModelError(
            f"the draft is for another target: num_target_layers {depth}, the target has {target.num_hidden_layers}",
            where=where,
        )
    if config.mask_token_id >= target.vocab_size:
        raise ModelError(
            f"mask id {config.mask_token_id} is outside the target's vocabulary of {target.vocab_size}", where=where
        )


def check_mask_embedding(directory: Path) -> None:
    """Refuse a draft with its own embedding of masks.

    Raises:
        ModelError: it has one.
    """
    if (directory / MASK_EMBEDDING).exists():
        what = f"the draft has an embedding of its own for masks ({MASK_EMBEDDING}), and the target's would be used"
        raise ModelError(what, where=str(directory), hint="such a draft is not supported; pickles are not read")


def check_tensors(directory: Path, family: type[Draft], config: DraftConfig) -> dict[str, Stored]:
    """Check that a checkpoint holds its family's tensors, by the headers of its files; list where each is stored.

    An embedding or a head of the target's shape is passed over, with a line that says so.

    Raises:
        ModelError: there are no weights, or a tensor is missing, extra, or of another shape or kind.
    """
    check_mask_embedding(directory)
    stored = _stored(directory)
    check_shapes({name: each.shape for name, each in stored.items()}, family, config, str(directory))
    return {name: each for name, each in stored.items() if name not in SHARED}


def check_shapes(shapes: Mapping[str, tuple[int, ...]], family: type[Draft], config: DraftConfig, where: str) -> None:
    """Check the names and shapes of a draft's tensors; raises as `check_tensors` does.

    Args:
        shapes: by name, as published or as ours.
        where: for messages.
    """
    own = {_own_name(name): shape for name, shape in shapes.items()}
    shared = {name: shape for name, shape in own.items() if name in SHARED}
    if passed := [name for name, shape in shared.items() if shape == (config.vocab_size, config.hidden_size)]:
        print(f"note: {where}: the draft has its own {_some(passed)}; the target's are used", file=sys.stderr)
    kept = {name: shape for name, shape in own.items() if name and name not in passed}
    _check(kept, family.tensor_shapes(config), where)


def _own_name(name: str) -> str:
    """Return our name of a published tensor; an empty one for what the config determines."""
    own = name.removeprefix("model.")
    return "" if own.endswith("rotary_emb.inv_freq") else ALIASES.get(own, own)  # older files have it


def _stored(directory: Path) -> dict[str, Stored]:
    files = [directory / WEIGHTS] if (directory / WEIGHTS).is_file() else sorted(directory.glob("model-*.safetensors"))
    if not files:
        raise ModelError("no weights: model.safetensors is missing", where=str(directory))
    found: dict[str, Stored] = {}
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
                header, own = tensors.get_slice(name), _own_name(name)
                if not own:
                    continue
                if own in found:
                    raise ModelError(f"{own} is there twice: as {found[own].name} and {name}", where=str(directory))
                if header.get_dtype() not in FLOATS:
                    what = f"{name} is stored as {header.get_dtype()}; drafts are read in {', '.join(FLOATS)}"
                    raise ModelError(what, where=str(file))
                found[own] = Stored(file, name, tuple(header.get_shape()), header.get_dtype())
    return found


def _read(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted({each.file for each in stored.values()}):
        with _opened(file) as tensors:
            state |= {name: tensors.get_tensor(each.name) for name, each in stored.items() if each.file == file}
    return state


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read weights: {error}", where=str(file)) from None


def _check(found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    if missing := sorted(shapes.keys() - found.keys()):
        raise ModelError(f"the draft lacks {_some(missing)}", where=where)
    if extra := sorted(found.keys() - shapes.keys()):
        hint = describe_tensors(extra)
        raise ModelError(f"the draft holds what no draft has: {_some(extra)}", where=where, hint=hint)
    for name, shape in shapes.items():
        if found[name] != shape:
            raise ModelError(f"{name} has shape {found[name]}, expected {shape} by its config", where=where)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
