"""Weights split over two real ranks train as whole ones do, and a checkpoint is the same to both."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dllm.config.params import Train
from dllm.errors import ConfigError
from dllm.methods.diffusion.build import initial_model
from dllm.training.checkpoints import OPTIMIZER, Checkpoints
from dllm.training.distributed import PeerLost
from tests.methods.diffusion.sharded_run import BUILTIN, FAMILIES, MIDDLE, SPLITS, STEPS
from tests.methods.diffusion.strategies import strategy_of
from tests.models.diffusion.remote_code import checkpoint
from tests.training.test_distribution import finish, ranked

pytestmark = pytest.mark.ranks

LAST = f"checkpoints/step-{STEPS:06d}"


def ran(folder: Path, what: str, ranks: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    code, lines = finish(ranked("tests.methods.diffusion.sharded_run", str(folder), what, ranks=ranks))
    assert (code, lines) == (0, [])
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(tmp_path_factory.mktemp(request.param), request.param)


def journal(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def tensors(folder: Path, name: str) -> Mapping[str, Tensor]:
    """Read optimizer state of the last checkpoint, or weights of the best: put together at the end of sharded runs."""
    if name == OPTIMIZER:
        return Checkpoints(folder, keep=1).load(folder / LAST)[1]
    best = folder / "checkpoints" / (folder / "checkpoints" / "best").read_text().strip()
    return load_file((best if (best / name).exists() else folder / "whole") / name)


def test_figures_are_those_of_whole_weights(runs: Path) -> None:
    whole, split = journal(runs / "whole"), journal(runs / "split")
    assert [(r["step"], r["kind"]) for r in whole] == [(r["step"], r["kind"]) for r in split]
    assert len(whole) == STEPS + STEPS // MIDDLE
    for left, right in zip(whole, split, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() & {"loss", "grad_norm", "lr", "masked_acc", "ar_loss", "val_loss", "val_nelbo"}:
            assert right[name] == pytest.approx(left[name], rel=1e-4), (name, left["step"])


@pytest.mark.parametrize("name", ["model.safetensors", OPTIMIZER])
def test_checkpoints_have_the_same_names_shapes_and_numbers(runs: Path, name: str) -> None:
    whole, split = tensors(runs / "whole", name), tensors(runs / "split", name)
    assert whole.keys() == split.keys()
    for key, tensor in whole.items():
        assert tensor.shape == split[key].shape and tensor.dtype == split[key].dtype
        assert (tensor - split[key]).abs().max() <= 2e-3 * tensor.abs().max() + 1e-6, key
    shards = {f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("weights", "optimizer") for rank in (1, 2)}
    assert {path.name for path in (runs / "split" / LAST).iterdir()} == shards | {"state.json"}
    assert not list((runs / "split" / "checkpoints").glob(".*"))


def test_a_resumed_run_ends_in_the_same_numbers(runs: Path) -> None:
    for file in ("model.safetensors", OPTIMIZER):
        straight, resumed = tensors(runs / "split", file), tensors(runs / "from_split", file)
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert journal(runs / "from_split")[-1]["val_loss"] == journal(runs / "split")[-1]["val_loss"]


def test_what_was_begun_with_whole_weights_goes_on_with_split_ones(runs: Path) -> None:
    straight, resumed = journal(runs / "whole"), journal(runs / "from_whole")
    assert resumed[-1]["val_loss"] == pytest.approx(straight[-1]["val_loss"], rel=1e-4)


def test_a_rank_holds_half_of_the_weights_and_moments(runs: Path) -> None:
    shares = json.loads((runs / "pieces.json").read_text())
    assert shares["weights"] == pytest.approx(0.5, abs=0.01)
    assert shares["moments"] == pytest.approx(shares["weights"])


def test_one_whole_model_at_a_time_lies_in_main_memory(runs: Path) -> None:
    by_rank = [json.loads((runs / f"held_by_{rank}.json").read_text()) for rank in range(2)]
    assert [len(spans) for spans in by_rank] == [4, 4]  # read for three runs, and to resume from whole weights
    for (first, end), (begin, last) in pairwise(sorted(by_rank[0] + by_rank[1])):
        assert first < end <= begin < last


def test_one_rank_alone_goes_the_same_way(tmp_path: Path) -> None:
    alone = ran(tmp_path, "builtin", ranks=1)
    assert json.loads((alone / "pieces.json").read_text()) == {"weights": 1.0, "moments": 1.0}
    whole, split = journal(alone / "whole"), journal(alone / "split")
    assert [r["loss"] for r in split if "loss" in r] == pytest.approx([r["loss"] for r in whole if "loss" in r])
    assert journal(alone / "from_split")[-1]["val_loss"] == split[-1]["val_loss"]


@pytest.mark.parametrize("changes", [{}, {"lora": {"target_modules": ["q_proj"]}}], ids=["weights", "adapters"])
def test_recomputed_layers_keep_less_and_give_the_same_gradients(changes: dict) -> None:
    gradients, kept = [], []
    for recompute in (False, True):
        section = {"activation_checkpointing": recompute, **changes}
        settings = Train.model_validate({"mode": "mdlm", "compute_dtype": "float32", "mdlm": section})
        strategy = strategy_of(initial_model(BUILTIN, settings, "cpu").train(), SPLITS, settings)
        held: dict[int, int] = {}

        def keep(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = strategy.terms("train", range(4), 0)
        kept.append(sum(held.values()))
        terms.numerator.backward()
        gradients.append({name: p.grad for name, p in strategy.model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept[1] < 0.7 * kept[0], kept


def test_an_expert_that_one_rank_alone_has_met_gets_its_gradient(tmp_path: Path) -> None:
    apart = json.loads((ran(tmp_path, "experts") / "experts.json").read_text())
    assert len(apart) == 4 and max(apart) < 1e-5


def test_a_killed_rank_is_one_line(tmp_path: Path) -> None:
    code, lines = finish(ranked("tests.methods.diffusion.sharded_run", str(tmp_path), "struck"))
    assert code != 0 and lines == [f"error: {PeerLost.MESSAGE}; {PeerLost.HINT}"]


def test_adapters_are_not_split() -> None:
    way = {"mode": "mdlm", "mdlm": {"fsdp": True, "lora": {"target_modules": ["q_proj"]}}}
    with pytest.raises(ValueError, match="remove one of them"):
        Train.model_validate(way)


def test_own_code_recomputes_split_weights_only(tmp_path: Path) -> None:
    target = checkpoint(tmp_path, "llada")
    settings = Train.model_validate({"mode": "mdlm", "mdlm": {"activation_checkpointing": True}})
    with pytest.raises(ConfigError, match="needs fsdp"):
        initial_model(target, settings, "cpu")
