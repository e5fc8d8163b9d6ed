"""The dry run before training: an untrained draft's export is written, read back, and held against what engines read.

A run of hours must not end in a checkpoint that does not load. Tensors are compared one by one with the draft's own, so
that one copy in the exported dtype is the most memory it takes, before gradients and moments exist.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from dllm.errors import ModelError
from dllm.models.drafts.checkpoint import WEIGHTS, read_config, save_draft
from dllm.models.drafts.protocol import Draft
from dllm.models.drafts.serving import refusals
from dllm.registry import SERVING_ENGINES


def dry_run(draft: Draft, dtype: torch.dtype, folder: Path) -> None:
    """Check the export that a run will end with, and print which serving engines cannot decode it.

    Args:
        draft: with its first weights.
        dtype: of the export.
        folder: to write into; it is removed.

    Raises:
        ModelError: what is read back is not what was written; the config or tensor is named.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        save_draft(draft, folder, dtype)
        check_export(draft, dtype, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not (refused := refusals(draft.config)):
        return
    able = [name for name in SERVING_ENGINES if name not in refused]
    line = f"engines that decode it as trained: {', '.join(able)}"
    if not able:
        line = f"no serving engine decodes a {draft.architectures[0]} as trained"
    reasons = "".join(f"; not {name}: {reason}" for name, reason in refused.items())
    print(f"train: {line}{reasons}", file=sys.stderr, flush=True)


def check_export(draft: Draft, dtype: torch.dtype, folder: Path) -> None:
    """Compare an export with the draft that was written: family, config, tensor names, shapes, dtype and values.

    Raises:
        ModelError: one differs.
    """

    def refuse(what: str) -> ModelError:
        return ModelError(f"an export of this {name} would not be what was trained: {what}", where=str(folder))

    name = draft.architectures[0]
    family, config = read_config(folder)
    if family is not type(draft):
        raise refuse(f"its config.json is read as a {family.architectures[0]}")
    written, read = (json.loads(json.dumps(each.to_json())) for each in (draft.config, config))
    if differing := [key for key in {**written, **read} if written.get(key) != read.get(key)]:
        raise refuse(f"{differing[0]} is {written.get(differing[0])}, and read as {read.get(differing[0])}")
    own, shapes = draft.state_dict(), family.tensor_shapes(config)
    with safe_open(folder / WEIGHTS, framework="pt") as stored:
        names = set(stored.keys())
        if other := sorted(names ^ shapes.keys()):
            raise refuse(f"{other[0]} is in one of model.safetensors and the table of its family only")
        for key, shape in shapes.items():
            tensor = stored.get_tensor(key)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise refuse(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
            if not torch.equal(tensor, own[key].detach().cpu().to(dtype)):
                raise refuse(f"{key} has other values")
