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


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Put tensors together, one at a time and in main memory, on the ranks that `keep` them; others get none.

    All ranks must call it, with the same names. What is one tensor under two names stays one.

    Shapes: of the whole tensors, where those given are pieces.
    """
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            whole = tensor.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            seen[id(tensor)] = whole.cpu() if keep else torch.empty(0)
        if keep:
            found[name] = seen[id(tensor)]
    return found


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Cut this rank's shard_like out of a whole tensor, as `like` is cut and where it lies; a copy in any case."""
    placed = tensor.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return placed
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def most(number: int, device: torch.device) -> int:
    """Return the largest number of any rank."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)
