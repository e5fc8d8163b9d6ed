"""Two ranks that train with whole and with split weights: `sharded_run.py FOLDER WHAT`, under torchrun.

Prints nothing; rank 0 leaves FOLDER/<way>/, and `pieces.json` with the share of numbers that it held.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from dllm.config.params import Target, Train
from dllm.methods.diffusion import build as initial
from dllm.methods.diffusion.masked import MaskedStrategy
from dllm.models import sharding
from dllm.tracking.runs import NullTracker
from dllm.training.batches import Example
from dllm.training.distributed import Ranks
from dllm.training.loop import Loop
from tests.methods.diffusion.strategies import strategy_of
from tests.methods.diffusion.test_strategy import row
from tests.models.diffusion.remote_code import checkpoint
from tests.training.toy import as_ranks_do

BLOCKS = {"attention": "block", "block_size": 4}
FAMILIES: dict[str, dict] = {
    "builtin": {"mode": "mdlm", "mdlm": {"complementary": True}},
    "llada": {"mode": "mdlm", "mdlm": {"normaliser": "sequence"}},
    "llada in bfloat16": {"mode": "mdlm", "compute_dtype": "bfloat16"},
    "llada2_moe": {"mode": "mdlm", "mdlm": BLOCKS},
    "nemotron_labs_diffusion": {"mode": "hybrid", "hybrid": BLOCKS},
}
SPLIT = {"fsdp": True, "activation_checkpointing": True}
STEPS, MIDDLE = 6, 2
BUILTIN = Target(model="builtin:tiny", dtype="float32")

# Rows of unlike length, in numbers that leave one rank without a micro-batch now and then.
SPLITS = {
    "train": [row(f"t{i}-0", 9 + (5 * i) % 13, 3 + i % 4, i) for i in range(9)],
    "heldout": [row("h-0", 14, 4, 50)],
}


class Struck:
    """Rank 1 is killed amid its third micro-batch, by nobody it could tell."""

    calls = 0

    def corrupt(self, *given):
        self.calls += 1
        if self.calls == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().corrupt(*given)


class Timed:
    """Notes when this rank held a whole model in main memory."""

    def __init__(self, file: Path) -> None:
        self.file, self.spans = file, list[tuple[float, float]]()
        initial._whole_model = self.of(initial._whole_model)
        MaskedStrategy._read = self.of(MaskedStrategy._read)

    def of(self, read):
        def timed(*given):
            began = time.monotonic()
            found = read(*given)
            self.spans.append((began, time.monotonic()))
            self.file.write_text(json.dumps(self.spans))
            return found

        return timed


def train(family: str, target: Target, ranks: Ranks, work: Path, mixin: type = object, **changes) -> Loop:
    way = FAMILIES[family]
    section = {way["mode"]: {**way.get(way["mode"], {}), **changes}}
    settings = Train.model_validate(
        {"compute_dtype": "float32", **way, "epochs": STEPS / 3, "batch_size": 2, "log_every": 1}
        | {"validate_every": MIDDLE, "grad_accumulation": 1, "keep_checkpoints": 9, **section}
    )
    splits: dict[str, list[Example]] = dict(SPLITS)
    strategy = strategy_of(initial.initial_model(target, settings, ranks.device), splits, settings, mixin)
    loop = Loop(strategy, settings, ranks, work=work, tracker=NullTracker())
    loop.run()
    return loop


def compare(folder: Path, family: str, ranks: Ranks) -> None:
    target = BUILTIN
    if family != "builtin":
        if ranks.is_main:
            checkpoint(folder / "published", family.split()[0])
        ranks.barrier()
        target = Target(model=str(folder / "published"), dtype="float32", trust_remote_code=True)
    train(family, target, ranks, folder / "whole")
    Timed(folder / f"held_by_{ranks.rank}.json")
    loop = train(family, target, ranks, folder / "split", **SPLIT)
    held = [p.to_local().numel() for p in loop.optimizer.parameters.values()]
    moments = [s.to_local().numel() for s in loop.optimizer.state().values() if s.ndim]
    if ranks.is_main:
        all_of_it = sum(p.numel() for p in loop.optimizer.parameters.values())
        shares = {"weights": sum(held) / all_of_it, "moments": sum(moments) / 2 / all_of_it}
        (folder / "pieces.json").write_text(json.dumps(shares))
        for start in ("whole", "split"):
            kept = folder / f"from_{start}" / "checkpoints"
            name = f"step-{MIDDLE:06d}"
            shutil.copytree(folder / start / "checkpoints" / name, kept / name)
            for pointer in ("latest", "best"):
                (kept / pointer).write_text(f"{name}\n")
    ranks.barrier()
    for start in ("whole", "split"):
        train(family, target, ranks, folder / f"from_{start}", **SPLIT)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x, which):
        return self.experts[which](x)


class Choosy(nn.Module):
    """Two experts, of which each rank's text meets one only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Experts()])

    def forward(self, x, which):
        return self.layers[0](x, which).square().sum()


def experts(folder: Path, ranks: Ranks) -> None:
    whole, split = Choosy(), Choosy()
    x = torch.arange(6.0).view(2, 3)
    for which in range(2):
        whole(x, which).backward()
    sharding.shard(split, sharding.mesh_of_ranks(ranks.device), torch.float32)
    split(x, ranks.rank).backward()
    grads = {name: p.grad for name, p in split.named_parameters()}
    together = {name: grad.full_tensor() for name, grad in grads.items()}
    if ranks.is_main:
        apart = [float((together[name] - p.grad).abs().max()) for name, p in whole.named_parameters()]
        (folder / "experts.json").write_text(json.dumps(apart))


def main(ranks: Ranks) -> None:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    if what == "struck":
        train("builtin", BUILTIN, ranks, folder / "struck", Struck, **SPLIT)
    elif what == "experts":
        experts(folder, ranks)
    else:
        compare(folder, what, ranks)


if __name__ == "__main__":
    sys.exit(as_ranks_do(main))
