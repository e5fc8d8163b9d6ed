"""The stages on a diffusion model: arithmetic, given answers, training, evaluation, the registry."""

import io
import json

import pytest
import yaml
from rich.console import Console

from dllm.config import recipe_book
from dllm.config.load import load_params, params_digest, parse_params
from dllm.config.params import Params
from dllm.methods.diffusion.evaluate import most_parallel
from dllm.methods.figures import DASH
from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.families import load_checkpoint
from dllm.registry import METHODS
from dllm.report import terminal
from dllm.stages import evaluate, prepare, regenerate, register, train
from dllm.stages.records import read_records, trained_method
from flows import artifacts
from tests.models.diffusion.remote_code import checkpoint

SMALL = {
    "target.model": "builtin:tiny",
    "prepare.sources": [{"name": "arithmetic", "limit": 40}],
    "prepare.heldout_fraction": 0.2,
    "train.epochs": 0.5,
    "train.batch_size": 4,
    "train.grad_accumulation": 1,
    "train.compute_dtype": "float32",
    "train.log_every": 1,
    "train.validate_every": 2,
    "train.validation_samples": 2,
    "evaluate.num_prompts": 2,
    "evaluate.max_new_tokens": 8,
    "evaluate.diffusion.likelihood_answers": 2,
    "evaluate.diffusion.likelihood_samples": 2,
}


def params(path, recipe: str, **changes) -> Params:
    raw = yaml.safe_load(recipe_book.text(recipe))
    for key, value in {**SMALL, **changes}.items():
        *parents, last = key.split(".")
        node = raw
        for parent in parents:
            node = node[parent]
        node[last] = value
    (path / "params.yaml").write_text(yaml.safe_dump(raw))
    return load_params(path / "params.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tiny-mdlm", "smollm2-135m-hybrid"])
def test_from_prompts_to_the_registry(tmp_path, monkeypatch, mlflow_store, recipe) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    given = {"engine": "dataset", "turns": "last", "max_new_tokens": 256}
    asked = params(tmp_path, recipe, **{f"regenerate.{key}": value for key, value in given.items()})
    prepare.run(asked, tmp_path)
    answers = regenerate.run(asked, tmp_path)
    assert answers["rows"] == 40
    trained = train.run(asked, tmp_path)
    assert trained["steps"] >= 4 and trained["masked_tokens"] > 0 and trained["val_nelbo"] > 0
    model = load_checkpoint(tmp_path / "out" / "train" / "checkpoint")
    block = asked.train.method_settings.block_size if asked.train.mode == "hybrid" else None
    assert model.config == DiffusionConfig(asked.train.mode, model.mask_token_id, block)
    found = evaluate.run(asked, tmp_path)
    assert found["nelbo"] > 0 and found["nelbo_se"] > 0
    assert found["score"] == (found["words_exact"] if recipe == "tiny-mdlm" else -found["nelbo"])
    assert found["prompts_too_long"] == 0 and found["answers_right"] is None  # of pages, only words are known
    ways = [(steps, None) for steps in asked.evaluate.diffusion.steps]
    ways += [(None, threshold) for threshold in asked.evaluate.diffusion.thresholds]
    ways += [(None, None)] * 2 if asked.train.mode == "hybrid" else []  # ar and self-spec
    assert [(way["steps"], way["threshold"]) for way in found["decodings"]] == ways
    if asked.train.mode == "hybrid":
        ar, speculated = found["decodings"][-2:]
        assert (ar["way"], speculated["way"]) == ("ar", "self-spec")
        assert ar["words_exact"] == speculated["words_exact"] and ar["tokens"] == speculated["tokens"]
    assert ("ar_nll" in found) == (asked.train.mode == "hybrid")
    assert sum(level["tokens"] for level in found["by_noise_level"]) > 0
    standing = register.run(asked, tmp_path)
    assert standing["score"] == found["score"] and standing["verdict"].startswith("champion")
    again = register.run(asked, tmp_path)
    assert again["version"] == standing["version"]
    record = json.loads((tmp_path / "out" / "evaluate" / "metrics.json").read_text())
    assert record["heldout_digest"] == found["heldout_digest"]
    headline = json.loads((tmp_path / "out" / "evaluate" / "headline.json").read_text())
    assert headline["score"] == found["score"] and 6 < len(headline) <= 10
    points = (tmp_path / "out" / "evaluate" / "plots" / "masked_accuracy.csv").read_text()
    assert points.startswith("masked,accuracy,series\n") and ",held-out responses\n" in points
    metrics, runs = read_records(tmp_path, "metrics.json"), read_records(tmp_path, "run.json")
    assert trained_method(runs) == asked.train.mode
    method = METHODS[asked.train.mode]
    (table,) = method.tables(metrics)
    assert table.key == "decodings" and [row["way"] for row in table.rows] == [w["way"] for w in record["decodings"]]
    summary = artifacts.summary(method.rows(metrics), metrics["register"], runs)
    assert f"| NELBO, held-out responses | {found['nelbo']:.4f} ± {found['nelbo_se']:.4f} nats per token |" in summary
    empty = [label for label, value in method.rows(metrics) if DASH in value.replace(f"training: {DASH}", "")]
    assert empty == ["correct final answers"], "the source has no references"
    printed = io.StringIO()
    terminal.print_report(tmp_path, Console(file=printed))
    for way in found["decodings"]:
        (line,) = [line for line in printed.getvalue().splitlines() if f" {way['way']} " in line]
        figures = f"{way['words_exact']:.3f} {way['answers_exact']:.3f} {way['tokens_per_pass']:.2f}"
        assert " ".join(line.split("│")[2].split()[-4:-1]) == figures


@pytest.mark.slow
def test_a_published_model_is_adapted_and_measured_through_its_own_code(tmp_path, monkeypatch, mlflow_store) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    target = checkpoint(tmp_path / "published", "nemotron_labs_diffusion", every_word=True)
    changes = {
        "target": target.model_dump(),
        "regenerate.engine": "dataset",
        "regenerate.turns": "last",
        "regenerate.max_new_tokens": 64,
        "train.hybrid.block_size": 4,
        "evaluate.diffusion.steps": [None],
        "train.hybrid.lora": {"rank": 2, "target_modules": ["q_proj"]},
    }
    asked = params(tmp_path, "smollm2-135m-hybrid", **changes)
    for stage in (prepare, regenerate, train, evaluate):
        found = stage.run(asked, tmp_path)
    assert found["nelbo"] > 0 and found["ar_nll"] > 0
    by_own_code = [way for way in found["decodings"] if way["sampler"] == "own"]
    assert {way["tokens_per_pass"] for way in by_own_code} == {8 / 5}  # its generate says 5 passes
    out = tmp_path / "out" / "train"
    assert {path.name for path in (out / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    written = json.loads((out / "checkpoint" / "config.json").read_text())
    assert written["dlm_paradigm"] == "bidirectional" and (out / "checkpoint" / "layout.py").is_file()
    trained = json.loads((out / "metrics.json").read_text())
    assert trained["trained_params"] < trained["params"] / 50


def test_the_most_parallel_way_loses_no_more_than_a_point() -> None:
    def way(words: float | None, tokens: float) -> dict[str, float | None]:
        return {"words_exact": words, "tokens_per_pass": tokens}

    plain, close, loose = way(0.97, 1.0), way(0.9601, 6.0), way(0.9599, 30.0)
    assert most_parallel([plain, loose, close]) is close
    assert most_parallel([plain, loose]) is plain
    nothing_to_score = [way(None, 1.0), way(None, 4.0)]
    assert most_parallel(nothing_to_score) is nothing_to_score[1]


def test_the_other_modes_sections_shape_no_digest(tmp_path) -> None:
    asked = params(tmp_path, "tiny-mdlm")
    raw = yaml.safe_load((tmp_path / "params.yaml").read_text())
    other = parse_params({**raw, "train": {**raw["train"], "hybrid": {"ar_loss_alpha": 0.7}}})
    assert params_digest(other.train) == params_digest(asked.train)
    own = parse_params({**raw, "train": {**raw["train"], "mdlm": {**raw["train"]["mdlm"], "eps": 0.01}}})
    assert params_digest(own.train) != params_digest(asked.train)
