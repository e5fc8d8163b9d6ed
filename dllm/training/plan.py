"""What a training run will cost, before anything is downloaded or computed: memory, steps, operations and hours.

A method counts what its step needs; here it is held against a machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dllm.config.params import Train
from dllm.errors import StageError

GIB = 1024**3
LOGIT_COPIES = 3
"""Of a chunk's logits, that exist at one time: of the chunk before, its probabilities, and the new ones."""


@dataclass(frozen=True)
class Device:
    """What one rank has."""

    title: str
    memory: int
    """Units: bytes."""
    peak: float | None = None
    """Dense bf16 matrix products, by its data sheet; None for a machine that is not known. Units: FLOP/s."""
    kind: str = "cuda"
    """As torch names it."""


DEVICES = {
    "h100": Device("H100 (80 GB)", 80 * 10**9, 989e12),
    "h200": Device("H200 (141 GB)", 141 * 10**9, 989e12),
}
"""Devices that a run may be planned for, by the value of `--on`."""


@dataclass(frozen=True)
class Workload:
    """The rows that are trained on.

    Units: tokens of a row.
    """

    rows: int
    length: float
    """Mean length."""
    longest: int
    supervised: float
    """Mean number of response tokens."""
    source: str
    """Where these figures are from, in a few words."""


@dataclass(frozen=True)
class Plan:
    """What one run needs.

    Units: bytes on one rank, floating-point operations of all ranks.
    """

    parameters: Mapping[str, int]
    """By model."""
    memory: Mapping[str, int]
    """By what it is used for, at the peak of a step."""
    step_flops: Mapping[str, float]
    """Of an optimizer step, by what computes."""
    once_flops: float = 0.0
    """Before the first step."""
    loading: int = 0
    """Bytes on one rank before the first step, where a whole model is there for a while."""
    notes: Sequence[str] = field(default=())
    """What is not counted, or assumed."""

    @property
    def bytes(self) -> int:
        """The most memory that one rank has in use."""
        return max(sum(self.memory.values()), self.loading)


@dataclass(frozen=True)
class Schedule:
    """How many steps a run takes, and on how many ranks."""

    steps: int
    epochs: float
    ranks: int

    @classmethod
    def of(cls, settings: Train, rows: int, ranks: int) -> Schedule:
        """Count the steps as the loop does."""
        per_epoch = max(1, -(-rows // (settings.batch_size * ranks * settings.grad_accumulation)))
        return cls(max(1, round(settings.epochs * per_epoch)), settings.epochs, ranks)

    def flops(self, plan: Plan) -> float:
        """Count the operations of the whole run."""
        return plan.once_flops + self.steps * sum(plan.step_flops.values())

    def hours(self, plan: Plan, device: Device, share: float) -> float | None:
        """Return the duration at a share of the device's peak; None where that is not known."""
        return None if device.peak is None else self.flops(plan) / (self.ranks * share * device.peak) / 3600


def rows_of(
    plan: Plan, workload: Workload, schedule: Schedule, here: Device, share: float
) -> Iterator[tuple[str, str]]:
    """Label and format a plan's figures."""
    for model, size in plan.parameters.items():
        yield f"parameters, {model}", f"{size:,}"
    yield "rows", f"{workload.rows:,} of {workload.length:,.0f} tokens ({workload.source})"
    tokens = workload.rows * workload.length * schedule.epochs
    yield (
        "steps",
        f"{schedule.steps:,} in {schedule.epochs:g} epochs, on {schedule.ranks} rank{'s' * (schedule.ranks > 1)}",
    )
    yield "tokens", f"{tokens:.3g}"
    for part, flops in plan.step_flops.items():
        yield f"FLOPs per step, {part}", f"{flops:.3g}"
    if plan.once_flops:
        yield "FLOPs before the first step", f"{plan.once_flops:.3g}"
    yield "FLOPs in all", f"{schedule.flops(plan):.3g}"
    for part, size in plan.memory.items():
        yield f"GiB per rank, {part}", f"{size / GIB:.2f}"
    if plan.loading:
        yield "GiB per rank before the first step", f"{plan.loading / GIB:.2f}"
    yield "GiB per rank at the most", f"{plan.bytes / GIB:.1f} of {here.memory / GIB:.1f} ({here.title})"
    for device in DEVICES.values():
        fits = "" if plan.bytes <= device.memory else ", which is too small"
        yield f"hours on {schedule.ranks} × {device.title}", f"{schedule.hours(plan, device, share):.3g}{fits}"
    yield "assumed share of the bf16 peak", f"{share:.0%}"
    for note in plan.notes:
        yield "note", note


def check_fits(plan: Plan, device: Device) -> None:
    """Refuse a run that a device has no memory for.

    Raises:
        StageError: with what takes most, and what helps.
    """
    if plan.bytes <= device.memory:
        return
    parts = {**plan.memory, "loading": plan.loading}
    most = max(parts, key=lambda part: parts[part])
    raise StageError(
        f"a rank needs {plan.bytes / GIB:.1f} GiB, {parts[most] / GIB:.1f} of them for {most}, and has "
        f"{device.memory / GIB:.1f} ({device.title})",
        where="train",
        hint="lower train.batch_size, num_blocks_per_sample, max_length or ce_chunk_size, or name another by --on",
    )


def saved_bytes(forward: Callable[[], Any], outside: Iterable[Tensor]) -> int:
    """Run a forward pass on the meta device, and add up what autograd keeps for the backward pass.

    Args:
        forward: on the meta device, so that it takes neither time nor memory.
        outside: tensors that are counted elsewhere, such as weights; copies of them in another dtype are kept, and
            count.
    """
    ids = {each.untyped_storage()._cdata for each in outside}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ids:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
