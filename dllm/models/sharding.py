"""FSDP2: a rank keeps its shard of every weight, gradient and moment, and borrows the rest a layer at a time.

Owns what a layer is, how a model is split or runs its layers again, and the ways between whole tensors and this rank's
shard of them. Shards are DTensors, cut along the first dimension. All ranks must run the same passes in the same order,
for each waits for the others' pieces.
Source: Zhao et al. 2023, PyTorch FSDP; Rajbhandari et al. 2020, ZeRO, stage 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from dllm.errors import ModelError


def mesh_of_ranks(device: torch.device) -> DeviceMesh:
    """Line up all ranks, to split weights over. All of them must call it."""
    if not dist.is_initialized():  # one rank alone keeps everything, by the same code
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return init_device_mesh(device.type, (dist.get_world_size(),))


def shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Split a model over all ranks in place: each of its layers by itself, and what is left as one.

    Nothing is sent: each rank cuts its pieces out of the whole model that it has read.

    Weights and moments stay in float32, and gradients add up in it; a pass sees weights in `dtype`. What runs the model
    must be a call of the model itself: only inside it are the embedding, the last norm and the head whole.

    Args:
        model: whole; it may still lie in main memory.
        mesh: the ranks; pieces go to this one's device.
        dtype: of the forward and backward pass.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    cast = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for part in (*layers_of(model), model):
        fully_shard(part, mesh=mesh, mp_policy=cast)
        assert isinstance(part, FSDPModule)
        # Sums, not averages: the loop divides once, by what all ranks have counted. gloo can do nothing but sums.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        # An expert that no token of this rank has met gives zeros, and the others' gradients still line up.
        part.set_reduce_scatter_unused_params(True, recurse=False)


def recompute_layers(model: nn.Module) -> None:
    """Keep only what goes into a layer for the backward pass, and run the layer again there.

    Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, section 3.
    """

    def run(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
        # A cache would take in a layer's keys a second time; nobody reads it in training.
        named |= {name: None for name in named if name in ("past_key_values", "past_key_value", "layer_past")}
        named |= {name: False for name in named if name == "use_cache"}
        return checkpoint(forward, *given, use_reentrant=False, **named)

    for layer in layers_of(model):
        layer.forward = partial(run, layer.forward)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """List a model's layers: the members of its outermost ModuleLists, not what lists there are within them."""
    found: list[nn.Module] = []
    for child in model.children():
        found += child if isinstance(child, nn.ModuleList) else layers_of(child)
    return found


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a model was split."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def own_shards(tensors: Mapping[str, Tensor], *, is_main: bool) -> dict[str, Tensor]:
    """Return this rank's shard of each tensor; what is not sharded is equal on all ranks and comes from rank 0 alone.

    What is one tensor under several names is returned under the first.
    """
    found: dict[str, Tensor] = {}
    for name, first in _first_names(tensors).items():
        tensor = tensors[name].detach()
        if name == first and isinstance(tensor, DTensor):
            found[name] = tensor.to_local().contiguous()
        elif name == first and is_main:
            found[name] = tensor
    return found


def named_like(model: nn.Module, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each name of a model's state its whole tensor; what is one tensor under several names stays one.

    Raises:
        ModelError: a tensor is missing, or of another shape.
    """
    own = model.state_dict(keep_vars=True)
    whole: dict[str, Tensor] = {}
    for name, first in _first_names(own).items():
        whole[name] = whole[first] if first != name else _of_shape(own[name], saved, name)
    return whole


def load_shards(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Load this rank's shards out of whole tensors, one at a time.

    Args:
        saved: what `own_shards` of all ranks make up.

    Raises:
        ModelError: a tensor is missing, or of another shape.
    """
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, first in _first_names(own).items():
            if name == first:
                own[name].copy_(shard_like(_of_shape(own[name], saved, name), own[name]))


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Cut this rank's shard out of a whole tensor, as `like` is cut and where it lies; a copy in any case."""
    placed = tensor.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return placed
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each name to the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def _of_shape(like: Tensor, saved: Mapping[str, Tensor], name: str) -> Tensor:
    tensor = saved.get(name)
    if tensor is None or tensor.shape != like.shape:
        raise ModelError(f"the checkpoint's {name} is missing or does not fit the model", hint="start the stage afresh")
    return tensor


def most(number: int, device: torch.device) -> int:
    """Return the largest number of any rank."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)
