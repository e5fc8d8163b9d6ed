"""The train stage on the tiny target: alone, under torchrun, killed and continued, and on bad input."""

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
from mlflow import MlflowClient
from safetensors.torch import load_file

from dllm.config.load import load_params
from dllm.config.params import Params
from dllm.errors import DataError, StageError
from dllm.models import target_identity
from dllm.models.drafts.checkpoint import load_draft
from dllm.responses.shards import Row, read_manifest, write_manifest
from dllm.stages import train
from tests.patience import LONGEST_S
from tests.responses.shard_folder import write_rows

ROOT = Path(__file__).parents[2]
EPOCHS = 8
RECIPE = yaml.safe_load((ROOT / "dllm/config/recipes/tiny-dflash.yaml").read_text())


def answer(index: int, split: str) -> Row:
    """Make an answer that counts upwards from the prompt's last id: something to learn."""
    prompt = [300 + (index * 7 + i) % 90 for i in range(5 + index % 4)]
    ids = [300 + (prompt[-1] + i - 299) % 90 for i in range(12 + index % 7)]
    return Row(f"{index:016x}", 0, "gsm8k", split, [], prompt, ids, "length", len(ids))


def prepare(root: Path, rows: list[Row] | None = None, **changes) -> Params:
    """Lay out a project folder with regenerated answers and a params.yaml."""
    folder = root / "out" / "regenerate"
    folder.mkdir(parents=True)
    made = rows or [answer(i, "heldout" if i % 4 == 0 else "train") for i in range(32)]
    write_rows(made, folder, shard_size=20, about={})
    raw = json.loads(json.dumps(RECIPE))
    raw["train"] |= {"epochs": EPOCHS, "validate_every": 20, "log_every": 4, **changes}
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    return load_params(root / "params.yaml")


def records(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "out/train/training.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def store(mlflow_store: str) -> Iterator[str]:
    """Name the store to all tests of the module, and to what they share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
        yield mlflow_store


@pytest.fixture(scope="module")
def alone(tmp_path_factory, store) -> tuple[Path, Params, dict]:
    """A whole run of one rank."""
    root = tmp_path_factory.mktemp("alone")
    params = prepare(root)
    return root, params, train.run(params, root)


def test_a_run_publishes_a_draft_its_curves_and_its_figures(alone, store) -> None:
    root, params, metrics = alone
    out = root / "out" / "train"
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == [
        "checkpoint/config.json",
        "checkpoint/model.safetensors",
        "curves.png",
        "evaluation/files.json",
        "headline.json",
        "metrics.json",
        *(f"plots/{name}.csv" for name in ("acceptance_length", "accuracy", "loss")),
        "run.json",
        "training.jsonl",
    ]
    assert json.loads((out / "metrics.json").read_text()) == pytest.approx(metrics)
    headline = json.loads((out / "headline.json").read_text())
    assert list(headline) == ["best_step", "steps", "val_acceptance_length", "val_draft_acc", "val_loss"]
    assert headline == pytest.approx({name: metrics[name] for name in headline})
    assert (out / "plots/loss.csv").read_text().count(",held-out\n") == len(
        {r["step"] for r in records(root) if r["kind"] == "validation"}
    )
    draft = load_draft(out / "checkpoint")
    assert sum(p.numel() for p in draft.parameters()) == metrics["draft_params"]
    assert not [name for name in load_file(out / "checkpoint/model.safetensors") if "embed" in name or "head" in name]
    assert (metrics["steps"], metrics["rows"], metrics["rows_dropped"]) == (EPOCHS * 6, 24, 0)
    found = records(root)
    losses = [r["loss"] for r in found if r["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert {f"draft_acc_k{k}" for k in (1, 2, 3)} <= found[0].keys()
    validations = [r for r in found if r["kind"] == "validation"]
    best = max(validations, key=lambda r: (r["val_walked_acceptance_length"], -r["val_loss"]))
    assert (metrics["best_step"], metrics["val_loss"]) == (best["step"], best["val_loss"])

    client = MlflowClient(store)
    first = json.loads((out / "run.json").read_text())["mlflow_run_id"]
    history = [m.step for m in client.get_metric_history(first, "draft_acc_k1")]
    assert history == [r["step"] for r in found if r["kind"] == "train"]
    assert client.get_run(first).info.status == "FINISHED"
    assert "curves.png" in [f.path for f in client.list_artifacts(first)]

    weights = (out / "checkpoint/model.safetensors").read_bytes()
    assert train.run(params, root) == metrics  # nothing to train: published again from the same work
    assert (out / "checkpoint/model.safetensors").read_bytes() == weights


def test_a_warm_start_records_the_draft_it_started_from(alone, tmp_path) -> None:
    published = alone[0] / "out/train/checkpoint"
    dflash = {**RECIPE["train"]["dflash"], "draft": {"init": str(published)}}
    train.run(prepare(tmp_path, epochs=0.2, dflash=dflash), tmp_path)
    identity = json.loads((tmp_path / "out/train/run.json").read_text())["identity"]
    assert identity["draft"] == {
        "model": str(published), "revision": None, "weights": target_identity.weights_digest(published)
    }  # fmt: skip
    assert "draft" not in json.loads((alone[0] / "out/train/run.json").read_text())["identity"]


def test_engines_that_cannot_decode_the_draft_are_named_before_the_first_step(tmp_path, store, capfd) -> None:
    draft = {**RECIPE["train"]["dflash"]["draft"], "sliding_window": 8}
    train.run(prepare(tmp_path, epochs=0.2, dflash={**RECIPE["train"]["dflash"], "draft": draft}), tmp_path)
    said = capfd.readouterr().err
    line = next(line for line in said.splitlines() if "engines that decode it as trained" in line)
    able = "train: engines that decode it as trained: sglang, vllm, lmdeploy, trtllm, z-lab"
    reason = "llama.cpp would decode layer 0 with bidirectional attention in a window of 8"
    assert line.startswith(f"{able}; not llamacpp: {reason}")
    assert said.index(line) < said.index("1/1 steps")
    assert not list(tmp_path.glob("work/train/*/dry-run"))


def test_a_killed_run_goes_on_to_the_same_bytes_in_the_same_tracked_run(alone, tmp_path, store) -> None:
    straight, _, metrics = alone
    params = prepare(tmp_path)

    def kill_when_under_way() -> None:
        while not [log for log in tmp_path.glob("work/train/*/training.jsonl") if log.read_text()]:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill_when_under_way, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        train.run(params, tmp_path)
    assert stopped.value.code == 143
    assert not (tmp_path / "out/train").exists()
    (latest,) = tmp_path.glob("work/train/*/checkpoints/latest")
    assert latest.read_text() < f"step-{metrics['steps']:06d}"
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name(params.recipe)
    assert experiment is not None
    query = "attributes.status = 'KILLED' and tags.`dllm.stage` = 'train'"
    (killed,) = client.search_runs([experiment.experiment_id], query)
    assert client.get_run(killed.data.tags["mlflow.parentRunId"]).info.status == "KILLED"

    again = train.run(params, tmp_path)
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}
    weights = "out/train/checkpoint/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (straight / weights).read_bytes()
    assert json.loads((tmp_path / "out/train/run.json").read_text())["mlflow_run_id"] == killed.info.run_id
    steps = [m.step for m in client.get_metric_history(killed.info.run_id, "draft_acc")]
    assert steps == [r["step"] for r in records(straight) if r["kind"] == "train"]


@pytest.mark.ranks
def test_two_ranks_train_like_one(alone, tmp_path) -> None:
    straight, _, _ = alone
    prepare(tmp_path, batch_size=2, nproc=2)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [sys.executable, *torchrun, "-m", "dllm", "train", "--root", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = records(straight), records(tmp_path)
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for left, right in zip(one[:6], two[:6], strict=True):
        for name in left.keys() & {"loss", "grad_norm", "lr", "val_loss"}:
            assert left[name] == pytest.approx(right[name], rel=1e-3), (name, left["step"])


def test_missing_answers_and_rows_without_words_are_refused(tmp_path, store) -> None:
    params = prepare(tmp_path / "short", max_length=5)
    with pytest.raises(DataError, match=r"none of 24 rows has 2 supervised tokens.*train\.max_length"):
        train.run(params, tmp_path / "short")
    with pytest.raises(StageError, match="out/regenerate"):
        train.run(params, tmp_path / "nowhere")


def test_answers_of_another_thinking_mode_are_refused(tmp_path, store) -> None:
    params = prepare(tmp_path)
    folder = tmp_path / "out/regenerate"
    write_manifest(folder, {**read_manifest(folder), "thinking": "off"})
    with pytest.raises(DataError, match=r"thinking off, and target\.enable_thinking asks for template default"):
        train.run(params, tmp_path)
    assert not (tmp_path / "out/train").exists()
