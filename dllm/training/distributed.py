"""Process group, collectives and failure propagation.

Started by dllm/training/launch.py, by torchrun, or alone. gloo on CPUs, nccl with GPUs. Each rank holds all weights
unless `dllm.models.sharding` splits them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dllm.errors import ConfigError, StageError
from dllm.training import launch

TIMEOUT = timedelta(minutes=30)
"""Collective timeout; one rank may fill its share of the feature cache while others wait."""

NOTICE_S = 15.0
"""Before a rank that waits for the others says so: the environment of an earlier torchrun may be left in a shell."""

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"

BUCKET = 1 << 26
"""Gradient elements per all-reduce: the size of the extra buffer."""


class PeerLost(StageError):
    """Another rank ended during a collective."""

    MESSAGE = "a rank ended early without a word"
    HINT = "look for a kill or for memory running out, then start again"

    def __init__(self) -> None:
        super().__init__(self.MESSAGE, hint=self.HINT)


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and its collectives."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes, publishes and logs to MLflow."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> None:
        """Sum a tensor over ranks, in place."""
        self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """Return the maximum over ranks."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        self._reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def sum(self, value: float) -> float:
        """Return the sum over ranks."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        self.sum_(tensor)
        return tensor.item()

    def barrier(self) -> None:
        """Block until all ranks arrive."""
        self.max(0.0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter], *, summed: bool = False) -> None:
        """Sum all gradients over ranks, in place, unless they are `summed` already; none is None afterwards.

        One coalesced pass after the last micro-batch, rather than DDP: DDP averages, while a pooled loss divides by a
        denominator known only when every rank has run its last micro-batch; and ranks may differ in how many
        micro-batches they run. What DDP would gain is overlap with the last backward pass.
        """
        pending = list(parameters)
        for parameter in pending:
            if parameter.grad is None:  # no micro-batch here, but peers wait for this rank's zeros
                parameter.grad = torch.zeros_like(parameter)
        if self.world == 1 or summed:
            return
        bucket: list[Tensor] = []
        for index, parameter in enumerate(pending):
            assert parameter.grad is not None
            bucket.append(parameter.grad)
            if index == len(pending) - 1 or sum(map(Tensor.numel, bucket)) >= BUCKET:
                self._sum_bucket(bucket)
                bucket = []

    def share_weights(self, model: nn.Module) -> None:
        """Broadcast the weights of rank 0."""
        if self.world > 1:
            for tensor in model.state_dict().values():
                with _talking():
                    dist.broadcast(tensor, 0)

    def _sum_bucket(self, gradients: Sequence[Tensor]) -> None:
        flat = torch.cat([g.flatten() for g in gradients])
        self.sum_(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _reduce(self, tensor: Tensor, how: dist.ReduceOp.RedOpType) -> None:
        if self.world > 1:
            with _talking():
                dist.all_reduce(tensor, how)


class Join:
    """Join the process group of the ranks that were started together; the world size of a rank alone is 1.

    When a rank fails, it alone prints why. Its peers notice the closed connection and end without a line; the launcher
    ends those that do not notice. A rank that was killed outright is reported by the launcher, or under torchrun by the
    first peer that misses it.

    Raises:
        ConfigError: there are GPUs, but fewer than ranks; or the environment is half that of torchrun.
        StageError: another rank ended early and had no time to say why, or did not come.
    """

    def __enter__(self) -> Ranks:
        self.world = _number("WORLD_SIZE", 1)
        local = _number("LOCAL_RANK", 0) if self.world > 1 else 0  # else left over in a shell
        device = device_of(local, torch.cuda.device_count() if torch.cuda.is_available() else 0)
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        if self.world == 1:
            return Ranks(0, 1, device)
        rank, local_world = _number("RANK"), _number("LOCAL_WORLD_SIZE", 1)
        if not cuda and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own default: it would idle most cores
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
        path = os.environ.get(launch.STORE)
        if local_world == self.world:  # one machine: stay on loopback
            for library in ("GLOO", "NCCL"):
                network = f"{library}_SOCKET_IFNAME"
                # With torchrun a user may name another network; ranks that we start listen on no other.
                os.environ[network] = LOOPBACK if path else os.environ.get(network, LOOPBACK)
        # Without a store of ours, that of torchrun.
        place = "" if path else f" at {os.environ.get('MASTER_ADDR')}:{_number('MASTER_PORT')}"
        store = dist.FileStore(path, self.world) if path else None  # type: ignore[attr-defined]
        backend, gpu = ("nccl", device) if cuda else ("gloo", None)
        with _met(rank, self.world, place):
            dist.init_process_group(
                backend, timeout=TIMEOUT, device_id=gpu, store=store, rank=rank, world_size=self.world
            )
        return Ranks(rank, self.world, device)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.world == 1:
            return
        if error is None:
            with _talking():
                dist.barrier()
            dist.destroy_process_group()
        elif isinstance(error, Exception):
            if launch.STORE in os.environ:
                if isinstance(error, PeerLost) or not _first_to_fail():
                    raise SystemExit(launch.PEER_LOST) from None  # the launcher knows how the other one ended
            elif not _first_to_fail():
                raise SystemExit(getattr(error, "exit_code", 1)) from None


def _number(name: str, otherwise: int | None = None) -> int:
    """Read a number that torchrun sets in the environment.

    Raises:
        ConfigError: it is missing or no number.
    """
    text = os.environ.get(name)
    if text is None and otherwise is not None:
        return otherwise
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9:
        found = "is missing" if text is None else f"is {text[:40]!r}"
        hint = "start the ranks by torchrun, which sets it; or unset WORLD_SIZE to train alone"
        raise ConfigError(f"{name} {found}", where="environment", hint=hint)
    return int(text)


@contextmanager
def _met(rank: int, world: int, place: str) -> Iterator[None]:
    """Wait for the other ranks, and say so when they are long in coming.

    Raises:
        StageError: they did not come, or do not fit together.
    """
    unset = "WORLD_SIZE is set in the environment; unset it to train alone"
    line = f"dllm: rank {rank} of {world} waits for the others{place}: {unset}"
    notice = threading.Timer(NOTICE_S, print, (line,), {"file": sys.stderr, "flush": True})
    notice.daemon = True
    notice.start()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        cause = str(error).strip().partition("\n")[0][:200]
        raise StageError(f"rank {rank} of {world} did not meet the others{place}: {cause}", hint=unset) from None
    finally:
        notice.cancel()


@contextmanager
def one_rank_at_a_time(device: torch.device) -> Iterator[None]:
    """Run the block on one rank per machine at a time, for work that holds a whole model; all ranks call it.

    Raises:
        PeerLost: another rank went away in its turn.
    """
    if not dist.is_initialized():
        yield
        return
    before, of = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    ranks = Ranks(before, of, device)
    for _ in range(before):
        ranks.barrier()
    yield
    for _ in range(before, of):
        ranks.barrier()


def device_of(local: int, gpus: int) -> torch.device:
    """Assign one GPU per rank, or the CPU to all ranks of the machine.

    Raises:
        ConfigError: there are GPUs, but none left for this rank.
    """
    if gpus == 0:
        return torch.device("cpu")
    if local >= gpus:
        raise ConfigError(
            f"more ranks than the {gpus} GPU{'s' if gpus > 1 else ''} of this machine",
            where="train.nproc",
            hint=f"set it to {gpus}, or hide the GPUs by CUDA_VISIBLE_DEVICES= and train on the CPU",
        )
    return torch.device("cuda", local)


def _first_to_fail() -> bool:
    # The store outlasts the ranks: it is a file of the launcher, or lives in torchrun's agent.
    try:
        return dist.distributed_c10d._get_default_store().add("dllm/failed", 1) == 1
    except RuntimeError:  # the agent itself is gone
        return True


@contextmanager
def peers_watched() -> Iterator[None]:
    """Report a broken connection to another rank as one error; other failures of the block pass through.

    Raises:
        PeerLost: gloo or nccl gave up.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise PeerLost from error
        raise


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # nothing else can fail here
        raise PeerLost from error
