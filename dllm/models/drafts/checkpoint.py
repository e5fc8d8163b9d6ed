"""A draft on disk, in the form published drafts have: config.json and model.safetensors.

Owns the proof that what is written is what SGLang, vLLM and this package will load: the exact set of names and shapes,
finite numbers, no embedding and no head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dllm.models.drafts.config import DraftConfig
    from dllm.models.drafts.dflash import DFlashDraft

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def tensor_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """List the tensors of a published draft: 11 a layer and 3 besides.

    Source: layout of z-lab's released checkpoints.
    """
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, hidden * len(config.target_layer_ids)),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for index in range(config.num_hidden_layers):
        shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def save_draft(draft: DFlashDraft, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write a draft into a directory; each file appears whole.

    Args:
        draft: what to write.
        directory: made if need be.
        dtype: of the weights on disk; None keeps the draft's own.

    Raises:
        ModelError: a tensor is missing, extra, of the wrong shape, or not finite.
    """
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in draft.state_dict().items()}
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    _check(state, draft.config, str(directory))
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise ModelError(f"weights are not finite: {_some(bad)}", where=str(directory), hint="lower the learning rate")
    config = draft.config.to_json() | {"dtype": str(next(iter(state.values())).dtype).removeprefix("torch.")}
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f".{WEIGHTS}.partial"
    save_file(state, aside, metadata={"format": "pt"})
    aside.rename(directory / WEIGHTS)
    aside = directory / f".{CONFIG}.partial"
    aside.write_text(json.dumps(config, indent=2) + "\n")
    aside.rename(directory / CONFIG)


def load_draft(source: str | Path, target_config: Any = None) -> DFlashDraft:
    """Load a draft with float32 weights from a directory or a Hugging Face id, and check that it fits its target.

    Args:
        source: a directory with config.json and *.safetensors, or a hub id.
        target_config: the target's transformers config; None skips the check of fit.

    Raises:
        ModelError: the draft is missing, incomplete, unreadable, or made for another target.
    """
    from dllm.models.drafts.dflash import DFlashDraft

    directory = Path(source)
    if not directory.is_dir():
        from dllm.models.targets import hub_snapshot, looks_like_hub_id

        if not looks_like_hub_id(str(source)):
            raise ModelError("no such draft directory", where=str(source))
        directory = hub_snapshot(str(source), None, ["*.json", "*.safetensors"], where="draft")
    config = read_config(directory)
    if target_config is not None:
        check_fit(config, target_config, str(directory))
    state = _read_weights(directory)
    _check(state, config, str(directory))
    draft = DFlashDraft(config)
    draft.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return draft


def read_config(directory: Path) -> DraftConfig:
    """Read a draft's config.json.

    Raises:
        ModelError: it is missing, not JSON, or not a DFlash draft's.
    """
    from dllm.models.drafts.config import DraftConfig

    path = directory / CONFIG
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError("no draft here: config.json is missing", where=str(directory)) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the draft's config: {error}", where=str(path)) from None
    return DraftConfig.from_json(raw, where=str(path))


def check_fit(config: DraftConfig, target_config: Any, where: str) -> None:
    """Make sure that a draft can read a target's features and speak through its embedding and head.

    Raises:
        ModelError: width, vocabulary, layers or mask id do not fit.
    """
    target = target_config.get_text_config()
    pairs = {
        "hidden_size": (config.hidden_size, target.hidden_size),
        "vocab_size": (config.vocab_size, target.vocab_size),
    }
    for name, (own, theirs) in pairs.items():
        if own != theirs:
            raise ModelError(f"the draft is for another target: {name} {own}, the target's is {theirs}", where=where)
    if max(config.target_layer_ids) >= target.num_hidden_layers:
        raise ModelError(
            f"the draft taps layer {max(config.target_layer_ids)} of a target with {target.num_hidden_layers}",
            where=where,
        )
    if config.mask_token_id >= target.vocab_size:
        raise ModelError(
            f"mask id {config.mask_token_id} is outside the target's vocabulary of {target.vocab_size}", where=where
        )


def _read_weights(directory: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [directory / WEIGHTS] if (directory / WEIGHTS).is_file() else sorted(directory.glob("model-*.safetensors"))
    if not files:
        raise ModelError("no weights: model.safetensors is missing", where=str(directory))
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read weights: {error}", where=str(file)) from None
    return state


def _check(state: Mapping[str, Tensor], config: DraftConfig, where: str) -> None:
    shapes = tensor_shapes(config)
    if missing := sorted(shapes.keys() - state.keys()):
        raise ModelError(f"the draft lacks {_some(missing)}", where=where)
    if extra := sorted(state.keys() - shapes.keys()):
        raise ModelError(f"the draft holds what no draft has: {_some(extra)}", where=where)
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ModelError(
                f"{name} has shape {tuple(state[name].shape)}, expected {shape} by its config", where=where
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
