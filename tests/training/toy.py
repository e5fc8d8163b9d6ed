"""A strategy small enough to see through: a two-layer regression whose rows differ in length and weight.

mypy checks it against the protocol. Run as a module under torchrun it trains with the real loop:
`toy.py WORK SETTINGS_JSON [WOE]`.
"""

import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dllm.config.params import Train
from dllm.errors import DataError, DllmError
from dllm.process import signals
from dllm.tracking.runs import NullTracker
from dllm.training.distributed import Join, Ranks
from dllm.training.loop import Loop
from dllm.training.strategy import LossSums, Rows, Split


class ToyStrategy:
    """Regress onto noise drawn from (split, epoch, row id); each row weighs as many units as it is long."""

    predictions_name = "points"
    adamw_rates: Mapping[str, float] = {}
    shown = ("loss", "hit_rate")
    counts = {"hits": 1, "seen": 1}  # noqa: RUF012 (a constant of the toy)

    def __init__(self, rows: int = 32, heldout: int = 6, woe: str | None = None) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))
        self.woe, self.calls = woe, 0
        self.train_rows = Rows([f"r{i}" for i in range(rows)], [1 + (7 * i) % 9 for i in range(rows)])
        self.heldout_rows = Rows([f"h{i}" for i in range(heldout)], [1 + i % 4 for i in range(heldout)])

    def terms(self, split: Split, rows: Sequence[int], epoch: int) -> LossSums:
        of = self.train_rows if split == "train" else self.heldout_rows
        total, weight, hits = torch.zeros(()), 0.0, 0.0
        for row in rows:
            generator = torch.Generator().manual_seed(_seed(split, epoch, of.ids[row]))
            x, y = torch.randn(of.lengths[row], 4, generator=generator), torch.randn(3, generator=generator)
            error = (self.model(x) - y - x[:, :3]).square().sum()
            total, weight, hits = total + error, weight + of.lengths[row], hits + float(error < 12)
        if split == "train":
            self.calls += 1
            self._suffer()
        return LossSums(total, weight, int(weight), len(rows), 100.0 * weight, {"hits": hits, "seen": len(rows)})

    def metrics(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        return {"hit_rate": sums["hits"][0] / sums["seen"][0]}

    def score(self, validation: Mapping[str, float]) -> tuple[float, ...]:
        return (-validation["val_loss"],)

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        kept = self.model.state_dict() if weights is None else dict(weights)
        save_file(kept, directory / "model.safetensors")
        (directory / "config.json").write_text("{}")

    def load(self, directory: Path) -> None:
        self.model.load_state_dict(load_file(directory / "model.safetensors"))

    def _suffer(self) -> None:
        """Meet with the woe named `<what>@<micro-batch>`, on rank 1 where there are ranks."""
        what, _, when = (self.woe or "none@0").partition("@")
        if self.calls != int(when) or os.environ.get("RANK", "1") != "1":
            return
        if what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "error":
            raise DataError("the shard is rotten", where="shard-00007")
        elif what == "bug":
            raise ZeroDivisionError("a bug")


def settings(**changes: Any) -> Train:
    """Make a train section for the toy."""
    base = {"epochs": 3, "batch_size": 4, "log_every": 2, "validate_every": 4, "compute_dtype": "float32"}
    optimizer = {"lr": 0.05, "weight_decay": 0.01, **changes.pop("optimizer", {})}
    return Train.model_validate({**base, **changes, "optimizer": optimizer})


def _seed(*parts: object) -> int:
    return random.Random(hashlib.sha256(repr(parts).encode()).hexdigest()).getrandbits(40)


def as_ranks_do(work: Callable[[Ranks], None]) -> int:
    """Work under torchrun, and end as the command line does: one line and a code."""
    with signals.handled():  # also while it says what is wrong: torchrun ends the peers of a rank that was killed
        try:
            with Join() as ranks:
                work(ranks)
        except DllmError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    return 0


def main(ranks: Ranks) -> None:
    work, raw, *woe = sys.argv[1:]
    strategy = ToyStrategy(woe=woe[0] if woe else None)
    Loop(strategy, settings(**json.loads(raw)), ranks, work=Path(work), tracker=NullTracker()).run()


if __name__ == "__main__":
    sys.exit(as_ranks_do(main))
