"""All-gather of tensors and of plain values over ranks.

Values travel as JSON in tensors of bytes, deliberately not as `all_gather_object` sends them: that pickles, and nothing
here unpickles.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def tensors(tensor: Tensor, world: int) -> Tensor:
    """Return all ranks' tensors of equal length, concatenated in rank order. Shapes: 1-dimensional."""
    if world == 1:
        return tensor
    parts = [torch.zeros_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def values(value: Any, world: int, device: torch.device) -> list[Any]:
    """Return all ranks' values: any nesting of dicts, tuples, lists, numbers, strings, booleans and None."""
    sent = torch.tensor(list(pack(value)), dtype=torch.uint8, device=device)
    lengths = tensors(torch.tensor([len(sent)], device=device), world).tolist()
    room = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    room[: len(sent)] = sent
    parts = tensors(room, world).split(len(room))
    return [unpack(bytes(part[:length].tolist())) for part, length in zip(parts, lengths, strict=True)]


def pack(value: Any) -> bytes:
    """Encode a value as JSON that keeps tuples, and keys of any type."""
    return json.dumps(_plain(value)).encode()


def unpack(data: bytes) -> Any:
    """Decode what `pack` encoded."""
    return _rich(json.loads(data))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {"mapping": [[_plain(key), _plain(inner)] for key, inner in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(inner) for inner in value]}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.item() if hasattr(value, "item") else value


def _rich(value: Any) -> Any:
    if isinstance(value, list):
        return [_rich(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_rich(inner) for inner in value["tuple"])
    return {_rich(key): _rich(inner) for key, inner in value["mapping"]}
