"""Metric sums, peak memory, and the matrix-product speed that mfu is relative to."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from dllm.training.strategy import LossSums

GIB = 1 << 30
OF_TERMS = ("numerator", "denominator", "tokens", "predictions", "flops")
ALWAYS = (*OF_TERMS, "grad_norm", "steps")


class Sums:
    """Named float64 sums in one flat vector, pooled by one all-reduce.

    Shapes: vector of the sizes added up.
    """

    def __init__(self, sizes: Mapping[str, int], device: torch.device | str = "cpu") -> None:
        self.sizes = {**dict.fromkeys(ALWAYS, 1), **sizes}
        self.vector = torch.zeros(sum(self.sizes.values()), dtype=torch.float64, device=device)
        self._parts = dict(zip(self.sizes, self.vector.split(list(self.sizes.values())), strict=True))

    def add(self, name: str, value: Tensor | float) -> None:
        """Add to one sum."""
        self._parts[name].add_(value.detach().to(self.vector) if isinstance(value, Tensor) else value)

    def add_terms(self, terms: LossSums) -> None:
        """Add a micro-batch."""
        for name in OF_TERMS:
            self.add(name, getattr(terms, name))
        for name, value in terms.counts.items():
            self.add(name, value)

    def read(self) -> dict[str, list[float]]:
        """Return all sums as plain numbers."""
        parts = self.vector.cpu().split(list(self.sizes.values()))
        return {name: part.tolist() for name, part in zip(self.sizes, parts, strict=True)}


def memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process: the accelerator's if there is one, else resident memory.

    Units: GiB.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def peak_flops(device: torch.device, dtype: torch.dtype, budget_s: float = 0.2) -> float:
    """Measure the fastest square matrix product of this rank, the denominator of mfu.

    Units: floating-point operations a second.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < budget_s or best == 0.0:
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
