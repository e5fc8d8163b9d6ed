"""DFlash 2 through the stages: from prompts to the registry, killed and resumed, on two ranks, from a plain draft."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dllm.config import recipe_book
from dllm.config.load import load_params
from dllm.config.params import Params
from dllm.models.drafts.checkpoint import load_draft
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.drafts.dflash2 import DFlash2Draft
from dllm.stages import evaluate, preflight, prepare, regenerate, register, train
from tests.arch.source_tree import ROOT
from tests.patience import LONGEST_S
from tests.stages import test_train

WEIGHTS = "out/train/checkpoint/model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def store(mlflow_store: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
        yield


def project(root: Path, draft: dict | None = None, dflash: dict | None = None, **changes) -> Params:
    """Lay out a project folder with made-up responses, which a draft can learn, and the recipe's params.yaml."""
    test_train.prepare(root)
    raw = yaml.safe_load(recipe_book.text("tiny-dflash2"))
    raw["train"] |= {"epochs": 6, "validate_every": 12, "log_every": 4, **changes}
    raw["train"]["dflash"] |= dflash or {}
    raw["train"]["dflash"]["draft"] |= draft or {}
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    return load_params(root / "params.yaml")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("alone")
    return root, train.run(project(root, dflash={"loss": "dpace", "loss_vocab": "corpus", "distill": 0.3}), root)


@pytest.mark.slow
def test_from_prompts_to_the_registry(tmp_path: Path) -> None:
    recipe_book.activate("tiny-dflash2", tmp_path / "params.yaml")
    params = load_params(tmp_path / "params.yaml")
    for stage in (prepare, regenerate, train):
        stage.run(params, tmp_path)
    found = evaluate.run(params, tmp_path)
    assert found["greedy_identical"] is True and found["tau_micro"] >= 1 and found["block_size"] == 4
    assert register.run(params, tmp_path)["version"] == 1


def test_its_figures_are_of_what_it_proposes_and_choose_the_checkpoint(alone) -> None:
    root, metrics = alone
    found = test_train.records(root)
    validations = [r for r in found if r["kind"] == "validation"]
    lengths = [r["acceptance_length"] for r in found if r["kind"] == "train"]
    assert lengths[-1] > lengths[0] + 0.3  # the loss grows with the draft's confidence, which weighs it
    best = max(validations, key=lambda r: (r["val_walked_acceptance_length"], -r["val_loss"]))
    assert metrics["best_step"] == best["step"]
    last = validations[-1]
    offsets = {f"val_{kind}_acc_k{k}" for kind in ("draft", "base") for k in (1, 2, 3)}
    assert offsets | {"val_candidate_recall", "val_base_acceptance_length", "val_base_acc"} <= last.keys()
    assert max(last["val_draft_acc"], last["val_base_acc"]) <= last["val_candidate_recall"]
    draft = load_draft(root / "out/train/checkpoint")
    assert type(draft) is DFlash2Draft and draft.candidate_selector.successor_codebook.abs().max() > 0.01


def test_a_killed_run_goes_on_to_the_same_bytes(alone, tmp_path: Path) -> None:
    straight, metrics = alone
    params = project(tmp_path, dflash={"loss": "dpace", "loss_vocab": "corpus", "distill": 0.3})

    def kill_when_under_way() -> None:
        while not [log for log in tmp_path.glob("work/train/*/training.jsonl") if log.read_text()]:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill_when_under_way, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        train.run(params, tmp_path)
    assert stopped.value.code == 143 and not (tmp_path / "out/train").exists()
    assert {**train.run(params, tmp_path), "seconds": 0} == {**metrics, "seconds": 0}
    assert (tmp_path / WEIGHTS).read_bytes() == (straight / WEIGHTS).read_bytes()


@pytest.mark.ranks
def test_two_ranks_train_like_one(alone, tmp_path: Path) -> None:
    straight, _ = alone
    dflash = {"loss": "dpace", "loss_vocab": "corpus", "distill": 0.3}
    project(tmp_path, dflash=dflash, batch_size=2, nproc=2)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [sys.executable, *torchrun, "-m", "dllm", "train", "--root", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = test_train.records(straight), test_train.records(tmp_path)
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for name in ("loss", "grad_norm", "candidate_recall", "acceptance_length", "base_acceptance_length"):
        assert one[0][name] == pytest.approx(two[0][name], rel=1e-3), name


@pytest.mark.ranks
def test_two_ranks_share_the_greedy_responses_that_are_walked_where_those_trained_on_are_sampled(
    tmp_path: Path,
) -> None:
    for name, nproc in (("one", 1), ("two", 2)):
        project(tmp_path / name, epochs=2, nproc=nproc)
        raw = yaml.safe_load((tmp_path / name / "params.yaml").read_text())
        raw["regenerate"] |= {"temperature": 0.7}
        (tmp_path / name / "params.yaml").write_text(yaml.safe_dump(raw))
    train.run(load_params(tmp_path / "one/params.yaml"), tmp_path / "one")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [sys.executable, *torchrun, "-m", "dllm", "train", "--root", str(tmp_path / "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {
        name: {path.name: path.read_text() for path in (tmp_path / name / "work/greedy").glob("*/*.json")}
        for name in ("one", "two")
    }
    assert found["one"] == found["two"] and len(found["one"]) == 8
    one, two = (
        next(r for r in test_train.records(tmp_path / name) if r["kind"] == "validation") for name in ("one", "two")
    )
    assert one["val_walked_acceptance_length"] == pytest.approx(two["val_walked_acceptance_length"], rel=0.05)


def test_training_goes_on_from_a_dflash_2_draft(alone, tmp_path: Path) -> None:
    before, _ = alone
    init = {"init": str(before / "out/train/checkpoint")}
    params = project(tmp_path, init, {"loss": "dpace", "loss_vocab": "corpus", "distill": 0.3}, log_every=1, epochs=1)
    preflight.check(params)
    train.run(params, tmp_path)
    first, start = test_train.records(tmp_path)[0], test_train.records(before)[0]
    assert first["acceptance_length"] > start["acceptance_length"] + 0.3
    raw = json.loads((tmp_path / "out/train/checkpoint/config.json").read_text())
    assert (
        raw["dflash_config"] == json.loads((before / "out/train/checkpoint/config.json").read_text())["dflash_config"]
    )


def test_a_plain_draft_goes_on_as_dflash_2_with_the_same_first_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Plain DFlash leaves the first slot out of its last layer; products of fewer rows round otherwise.
    monkeypatch.setattr(DFlashDraft, "mixes_slots", True)
    plain = project(tmp_path / "plain", {"architecture": "dflash", "dflash2": None})
    train.run(plain, tmp_path / "plain")
    init = {"init": str(tmp_path / "plain/out/train/checkpoint")}
    quiet = {"selector_rank": 16, "selector_top_k": 8, "selector_loss_weight": 0.0}
    runs = {
        "plain": project(tmp_path / "on", {"architecture": "dflash", "dflash2": None, **init}, log_every=1, epochs=1),
        "dflash2": project(tmp_path / "up", {"dflash2": quiet, **init}, log_every=1, epochs=1),
    }
    for name, folder in (("plain", "on"), ("dflash2", "up")):
        train.run(runs[name], tmp_path / folder)
    before, after = (test_train.records(tmp_path / folder)[0] for folder in ("on", "up"))
    assert after["loss"] == before["loss"] and after["acceptance_length"] == before["acceptance_length"]
    raw = json.loads((tmp_path / "up/out/train/checkpoint/config.json").read_text())
    assert raw["architectures"] == ["DFlash2DraftModel"] and raw["dflash_config"]["selector_rank"] == 16
