"""evaluate, whole: a random draft on held-out prompts, broken off, resumed, and wrong inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dllm.config.load import parse_params
from dllm.config.params import Params, Target
from dllm.decoding.comparison import Comparison, Pair
from dllm.errors import ConfigError, DataError, ModelError, StageError
from dllm.models import targets
from dllm.models.drafts.checkpoint import load_draft, save_draft
from dllm.models.drafts.dflash import DFlashDraft
from dllm.prompts.table import HELDOUT, TRAIN, Prompt, prompt_id, write_prompts
from dllm.stages import evaluate
from dllm.tracking import mlflow_runs as tracking
from dllm.tracking import model_registry, provenance
from tests.decoding import stand_in_drafts

TARGET = Target(model="builtin:tiny", dtype="float32")


def params(**settings: Any) -> Params:
    plain = {"num_prompts": 3, "max_new_tokens": 10, "identity_prompts": 2}
    return parse_params(
        {
            "recipe": "test",
            "target": TARGET.model_dump(),
            "prepare": {"sources": [{"name": "x.jsonl"}]},
            "evaluate": {**plain, **settings},
            "register": {"model_name": "test"},
        }
    )


def make_prompts(*kinds: tuple[str, str, int], words: int = 3) -> list[Prompt]:
    """Make `count` prompts of each (source, split)."""
    made = []
    for source, split, count in kinds:
        for number in range(count):
            messages = [{"role": "user", "content": f"{source} {split} {number} " + "word " * words}]
            made.append(Prompt(prompt_id(messages), source, split, messages))
    return sorted(made, key=lambda prompt: prompt.id)


@pytest.fixture(scope="module")
def draft() -> DFlashDraft:
    draft = DFlashDraft(stand_in_drafts.config(targets.load_target(TARGET), 4))
    draft.reset_parameters(seed=3)
    return draft


@pytest.fixture
def root(tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch, draft: DFlashDraft) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    (tmp_path / "out" / "prepare").mkdir(parents=True)
    prompts = make_prompts(("sums", HELDOUT, 5), ("code", HELDOUT, 2), ("sums", TRAIN, 4))
    write_prompts(prompts, tmp_path / "out" / "prepare" / "prompts.parquet")
    save_draft(draft, tmp_path / "out" / "train" / "checkpoint")
    return tmp_path


def test_every_figure_is_there_and_agrees_with_the_others(root: Path, draft: DFlashDraft) -> None:
    metrics = evaluate.run(params(), root)
    out = root / "out" / "evaluate"
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert {p.name for p in out.iterdir()} == {
        "evaluation.png", "acceptance.json", "prompts.parquet", "samples.json", "metrics.json", "headline.json",
        "plots", "run.json",
    }  # fmt: skip
    headline = json.loads((out / "headline.json").read_text())
    assert headline["tau_micro"] == metrics["walked"]["tau_micro"] and len(headline) <= 10
    assert "1," in (out / "plots/acceptance.csv").read_text()
    assert metrics["prompts"] == 5 and metrics["tokens"] <= 50
    assert metrics["greedy_identical"] is metrics["walk_identical"] is True
    assert metrics["identity_identical"] == metrics["identity_prompts"] == 2
    assert metrics["identical_fraction"] == metrics["same_prefix_fraction"] == 1.0, "float32 throughout"
    assert 1 <= metrics["tau_micro"] <= 4 and 1 <= metrics["tau_macro"] <= 4
    assert len(metrics["acceptance_by_offset"]) == len(metrics["conditional_acceptance_by_offset"]) == 3
    assert metrics["speedup"] == pytest.approx(metrics["tokens_per_s_spec"] / metrics["tokens_per_s_ar"])
    assert metrics["block_size"] == 4 and metrics["draft_layers"] == 1
    assert metrics["draft_params"] == sum(p.numel() for p in draft.parameters())
    assert {source: part["prompts"] for source, part in metrics["by_source"].items()} == {"sums": 3, "code": 2}
    for name in ("prompts", "tokens", "rounds"):
        assert sum(part[name] for part in metrics["by_source"].values()) == metrics[name]
    rows = pq.read_table(out / "prompts.parquet").to_pylist()
    held_out = make_prompts(("sums", HELDOUT, 5), ("code", HELDOUT, 2))
    first_sums = [p.id for p in held_out if p.source == "sums"][:3]
    assert [row["prompt_id"] for row in rows if row["source"] == "sums"] == first_sums
    assert sum(row["rounds"] for row in rows) == metrics["rounds"]
    curves = json.loads((out / "acceptance.json").read_text())
    assert curves["all"]["acceptance_by_offset"] == metrics["acceptance_by_offset"]

    run_id = json.loads((out / "run.json").read_text())["mlflow_run_id"]
    client = tracking.connect(tracking.tracking_uri(root))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["tau_micro"] == metrics["tau_micro"]
    assert run.data.metrics["by_source.code.prompts"] == 2
    history = client.get_metric_history(run_id, "acceptance_at_offset")
    assert [(m.step, m.value) for m in history] == list(enumerate(metrics["acceptance_by_offset"], start=1))
    assert {"evaluation.png", "acceptance.json", "prompts.json"} <= {f.path for f in client.list_artifacts(run_id)}


def test_a_temperature_adds_sampled_acceptance_and_leaves_the_greedy_figures(root: Path) -> None:
    greedy = evaluate.run(params(identity_prompts=1), root)
    metrics = evaluate.run(params(identity_prompts=1, temperature=1.0, top_k=3), root)
    assert "sampled" not in greedy and metrics["greedy_identical"] is True
    for name in ("tau_micro", "rounds", "acceptance_by_offset", "heldout_digest"):
        assert metrics[name] == greedy[name]
    sampled = metrics["sampled"]
    assert (sampled["temperature"], sampled["top_k"], sampled["top_p"], sampled["prompts"]) == (1.0, 3, 1.0, 5)
    assert sampled["rounds"] > 0 and 1 <= sampled["tau_micro"] <= 4 and sampled["expected_acceptance_by_offset"][0] > 0
    for name in ("expected_acceptance_by_offset", "expected_conditional_acceptance_by_offset"):
        assert len(sampled[name]) == 3 and all(share is None or 0 <= share <= 1 for share in sampled[name])
    again = evaluate.run(params(identity_prompts=1, temperature=1.0, top_k=3, num_prompts=3), root)
    assert again["sampled"] == sampled


def test_a_smaller_block_is_reported_as_what_was_used(root: Path) -> None:
    metrics = evaluate.run(params(block_size=2, identity_prompts=0), root)
    assert metrics["block_size"] == 2 and len(metrics["acceptance_by_offset"]) == 1
    assert metrics["greedy_identical"] is None
    with pytest.raises(ModelError, match="block size 5 for a draft that was trained on blocks of 4"):
        evaluate.run(params(block_size=5), root)
    assert json.loads((root / "out" / "evaluate" / "metrics.json").read_text())["block_size"] == 2


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Note which prompts are decoded for the record, and lose the power at the third, once."""
    ids: list[str] = []
    real = Comparison.decode

    def noting(self: Comparison, *args: Any, prompt_id: str = "", **named: Any) -> Pair:
        if prompt_id:
            if len(ids) == 2:
                ids.append("broken off")
                raise StageError("no power")
            ids.append(prompt_id)
        return real(self, *args, prompt_id=prompt_id, **named)

    monkeypatch.setattr(Comparison, "decode", noting)
    yield ids


def test_broken_off_it_goes_on_with_the_rest_and_the_same_run(root: Path, decoded: list[str]) -> None:
    with pytest.raises(StageError, match="no power"):
        evaluate.run(params(identity_prompts=0), root)
    assert not (root / "out" / "evaluate").exists()
    sidecar = next((root / "work" / "evaluate").glob("*/stage.json"))
    run_id = json.loads(sidecar.read_text())["mlflow_run_id"]
    metrics = evaluate.run(params(identity_prompts=0), root)
    assert len(decoded) == len(set(decoded)) == 6, "five prompts, each once, and the break"
    assert metrics["prompts"] == 5
    assert json.loads((root / "out" / "evaluate" / "run.json").read_text())["mlflow_run_id"] == run_id
    evaluate.run(params(identity_prompts=0), root)
    assert len(decoded) == 11, "a finished stage that is run again measures again"


def test_what_was_measured_on_has_a_name(root: Path) -> None:
    few = evaluate.run(params(identity_prompts=0, num_prompts=1, max_new_tokens=2), root)["heldout_digest"]
    more = evaluate.run(params(identity_prompts=0, num_prompts=2, max_new_tokens=2), root)["heldout_digest"]
    again = evaluate.run(params(identity_prompts=1, num_prompts=1, max_new_tokens=2), root)["heldout_digest"]
    assert few == again != more


def test_prompts_without_room_for_an_answer_are_left_out_and_counted(root: Path) -> None:
    path = root / "out" / "prepare" / "prompts.parquet"
    long = make_prompts(("long", HELDOUT, 2), words=3000)
    write_prompts([*long, *make_prompts(("sums", HELDOUT, 1))], path)
    metrics = evaluate.run(params(identity_prompts=0, max_new_tokens=2), root)
    assert metrics["prompts"] == 1 and metrics["prompts_too_long"] == 2
    write_prompts(long, path)
    with pytest.raises(DataError, match=r"no held-out prompt.*2 were longer than the target's 2048 positions"):
        evaluate.run(params(), root)


def test_missing_inputs_are_one_line(root: Path) -> None:
    weights = root / "out" / "train" / "checkpoint" / "model.safetensors"
    weights.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        evaluate.run(params(), root)
    (weights.parent / "config.json").unlink()
    weights.parent.rmdir()
    with pytest.raises(StageError, match="input is missing"):
        evaluate.run(params(), root)


def test_a_registered_checkpoint_is_measured_into_a_folder_of_its_own(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = params(identity_prompts=0, num_prompts=1, max_new_tokens=4, walk={"prompts": 0})
    measured = evaluate.run(plain, root)
    trained = root / "out" / "train" / "checkpoint"
    digest = provenance.digest(trained)
    kept = Path(shutil.copytree(trained, model_registry.store_path(root, digest)))
    model_registry.register(root, "of-evaluate", digest=digest, tau=1.5, heldout_digest="h", target="t", tags={})
    shutil.rmtree(trained)
    name, to = "models:/of-evaluate@champion", root / "apart"
    _, metrics = evaluate.run_on(name, plain, root, to)
    same = ("tau_micro", "rounds", "heldout_digest", "acceptance_by_offset")
    assert {key: metrics[key] for key in same} == {key: measured[key] for key in same}
    assert json.loads((to / "metrics.json").read_text())["tau_micro"] == metrics["tau_micro"]
    record = json.loads((to / "run.json").read_text())
    assert (record["identity"]["checkpoint"], record["inputs"]["checkpoint"]) == (name, digest)
    run = tracking.connect(tracking.tracking_uri(root)).get_run(record["mlflow_run_id"])
    assert (run.info.run_name, run.info.status) == (f"evaluate {name}", "FINISHED")
    assert "mlflow.parentRunId" not in run.data.tags
    assert json.loads((root / "out" / "evaluate" / "run.json").read_text())["inputs"]["checkpoint"] == digest

    with pytest.raises(StageError, match="the output folder is not empty"):
        evaluate.run_on(name, plain, root, to)
    other = {"identity": {"target": {"model": "another/target", "revision": None}, "method": "dflash"}}
    (kept / "run.json").write_text(json.dumps(other))
    evaluate.run_on(name, plain, root, root / "other-target")
    assert "was trained for another/target, and is measured with builtin:tiny" in capsys.readouterr().err
    (kept / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has changed since it was registered"):
        evaluate.run_on(name, plain, root, root / "third")
    monkeypatch.chdir(root)
    with pytest.raises(ModelError, match="has changed since it was registered"):
        load_draft(name)
    with pytest.raises(ConfigError, match="has a version, no revision"):
        load_draft(name, revision="main")
