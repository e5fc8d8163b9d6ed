"""evaluate on prompt sets: figures by set and thinking mode beside the held-out ones, and what training has asked."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dllm.config.load import parse_params
from dllm.config.params import Params, Source, Target
from dllm.decoding.acceptance import Acceptance
from dllm.decoding.speculative import Decoder
from dllm.errors import DataError
from dllm.methods.dflash import sets as prompt_sets
from dllm.methods.dflash.sets import load, published_of
from dllm.models import builtin, targets
from dllm.models.drafts.checkpoint import load_draft, save_draft
from dllm.models.drafts.dflash import DFlashDraft
from dllm.prompts import sets
from dllm.prompts import template as chat
from dllm.prompts.sets import GSM8K
from dllm.prompts.table import HELDOUT, TRAIN, Prompt, prompt_id, write_prompts
from dllm.registry import METHODS
from dllm.report import terminal
from dllm.stages import evaluate, prepare
from dllm.stages.outside_data import changed_sets
from tests.decoding import stand_in_drafts

THINKS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}{{ 'no thought' }}{% endif %}{% endif %}"
)


def params(model: str, **settings: Any) -> Params:
    plain = {"num_prompts": 2, "max_new_tokens": 4, "identity_prompts": 1, "walk": {"prompts": 2}}
    return parse_params(
        {
            "recipe": "test",
            "target": {"model": model, "dtype": "float32"},
            "prepare": {"sources": [{"name": "aime"}], "heldout_fraction": 0.3},
            "evaluate": {**plain, **settings},
            "register": {"model_name": "test"},
        }
    )


def asked(text: str, split: str) -> Prompt:
    messages = [{"role": "user", "content": text}]
    return Prompt(prompt_id(messages), "mine", split, messages)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with a template that knows thinking modes."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    shutil.copytree(builtin.directory("builtin:tiny"), folder)
    for digests in folder.glob(".*"):
        digests.unlink()
    (folder / "chat_template.jinja").write_text(THINKS)
    return folder


@pytest.fixture
def root(tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    (tmp_path / "out" / "prepare").mkdir(parents=True)
    gsm8k = [GSM8K.bare(prompt.messages[0]["content"]) for prompt in sets.read(Source(name="gsm8k"), tmp_path)]
    prompts = [asked(text, TRAIN) for text in gsm8k[:1]] + [asked(f"Held out {n}", HELDOUT) for n in range(3)]
    write_prompts(sorted(prompts, key=lambda p: p.id), tmp_path / "out" / "prepare" / "prompts.parquet")
    draft = DFlashDraft(stand_in_drafts.config(targets.load_target(Target(model="builtin:tiny", dtype="float32")), 4))
    draft.reset_parameters(seed=3)
    save_draft(draft, tmp_path / "out" / "train" / "checkpoint")
    return tmp_path


def test_sets_are_measured_apart_in_each_mode_without_what_training_has_asked(
    root: Path, thinker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = evaluate.run(params(str(thinker)), root)
    assert "sets" not in plain
    listed = ["gsm8k", {"name": "humaneval", "limit": 1}]
    metrics = evaluate.run(params(str(thinker), sets=listed, thinking=[True, False]), root)
    found = metrics["sets"]
    counts = {name: (each["prompts"], each["thinking"], each["prompts_in_training"]) for name, each in found.items()}
    assert counts == {
        "gsm8k thinking on": (2, True, 1), "gsm8k thinking off": (2, False, 1),
        "humaneval thinking on": (1, True, 0), "humaneval thinking off": (1, False, 0),
    }  # fmt: skip
    assert all(each["tau_micro"] >= 1 for each in found.values()) and "sampled" not in found["gsm8k thinking on"]
    said = capsys.readouterr().out
    assert "evaluate: set gsm8k: 1 of 1319 prompts left out: training prompts of mine ask the same, such as" in said
    same = ("prompts", "tau_micro", "rounds", "heldout_digest", "greedy_identical")
    assert {name: metrics[name] for name in same} == {name: plain[name] for name in same}, "champions compare these"
    assert set(metrics["by_source"]) == {"mine"}
    curves = json.loads((root / "out/evaluate/acceptance.json").read_text())
    assert curves["set humaneval thinking off"]["rounds"] == found["humaneval thinking off"]["rounds"]
    record = json.loads((root / "out/evaluate/run.json").read_text())
    assert len(record["identity"]["set 0 gsm8k"]["test.jsonl"]) == 64
    text = io.StringIO()
    terminal.print_report(root, Console(file=text))
    (line,) = [line for line in text.getvalue().splitlines() if "gsm8k thinking off" in line]
    assert f"{found['gsm8k thinking off']['tau_micro']:.2f}" in line


def test_acceptance_on_a_set_is_that_of_decoding_and_sampled_where_asked(root: Path) -> None:
    asked = params("builtin:tiny", sets=["gsm8k"], temperature=1.0, walk={"prompts": 2})
    found = evaluate.run(asked, root)["sets"]["gsm8k"]
    assert found["sampled"]["temperature"] == 1.0 and found["sampled"]["prompts"] == 2
    target = targets.load_target(asked.target)
    decoder = Decoder(target, load_draft(root / "out/train/checkpoint", target.config))
    stop_ids = chat.stop_ids(targets.load_tokenizer(asked.target), target.generation_config)
    (measured,) = load(asked, root, targets.load_tokenizer(asked.target), decoder.limit, 2)
    first = [prompt.id for prompt in sets.read(Source(name="gsm8k"), root)[1:3]]
    assert [q.id for q in measured.questions] == [f"{id}-set0" for id in first], "the first of all is a training prompt"
    acceptance = Acceptance(4)
    for question in measured.questions:
        acceptance.add(r.counts for r in decoder.generate(question.ids, max_new_tokens=4, stop_ids=stop_ids).rounds)
    assert (acceptance.rounds, acceptance.tau_micro) == (found["rounds"], found["tau_micro"])


def test_what_cannot_be_measured_is_one_line(root: Path) -> None:
    with pytest.raises(DataError, match="renders the same prompts with thinking on and off"):
        evaluate.run(params("builtin:tiny", sets=["humaneval"], thinking=[True, False]), root)
    (root / "mine.jsonl").write_text(json.dumps({"messages": "word " * 3000}) + "\n")
    with pytest.raises(DataError, match=r"none of 1 prompts can be measured \(0 in_training, 1 too_long"):
        evaluate.run(params("builtin:tiny", sets=["mine.jsonl"]), root)
    with pytest.raises(DataError, match=r"no such set \(evaluate\.sets: gsm9k\)"):
        evaluate.run(params("builtin:tiny", sets=["gsm9k"]), root)


def test_a_set_out_of_reach_stops_prepare_and_not_the_run_after_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder \(evaluate\.sets: there/is/none\.jsonl\)"):
        prepare.run(params("builtin:tiny", sets=["there/is/none.jsonl"]), tmp_path)
    with pytest.raises(DataError, match="renders the same prompts with thinking on and off"):
        prepare.run(params("builtin:tiny", sets=["humaneval"], thinking=[True, False]), tmp_path)
    assert not (tmp_path / "out").exists()


def test_published_figures_are_of_the_same_kind_alone() -> None:
    kind = {"target": "Qwen/Qwen3-8B", "draft": "DFlashDraftModel", "block_size": 16, "temperature": 0.0}
    both = published_of("gsm8k", False, **kind)
    assert [(each["tau"], each["by"]) for each in both] == [(6.54, "DFlash, Table 1"), (6.34, "Model-Optimizer 2342")]
    assert [each["tau"] for each in published_of(name="gsm8k", thinking=True, **kind)] == [6.34], (
        "its mode is not stated"
    )
    assert published_of("mt-bench", False, **kind)[0]["note"] == "both turns"
    later = {**kind, "draft": "DFlash2DraftModel"}
    assert [each["tau"] for each in published_of("math500", False, **later)] == [9.0]
    smaller = published_of("mt-bench", False, **{**kind, "block_size": 8})
    assert [(each["tau"], each["note"]) for each in smaller] == [(4.24, "both turns, block 16")]
    others = {"target": "Qwen/Qwen3-14B", "temperature": 0.7, "draft": "Other"}
    for key, value in others.items():
        assert published_of("gsm8k", False, **{**kind, key: value}) == []
    sampled = {**kind, "block_size": 7, "temperature": 1.0}
    assert [each["tau"] for each in published_of("alpaca", None, **sampled)] == [2.98]


def test_published_figures_stand_in_the_metrics_and_the_report(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = {"target": "builtin:tiny", "draft": "DFlashDraftModel", "thinking": None}
    known = [
        {**of, "block_size": 4, "temperature": 0.0, "by": "Greedy et al.", "tau": {"gsm8k": 6.25}},
        {**of, "block_size": 8, "temperature": 1.0, "by": "Sampled et al.", "tau": {"gsm8k": 5.75}},
    ]
    monkeypatch.setattr(prompt_sets, "_published", lambda: known)
    found = evaluate.run(params("builtin:tiny", sets=["gsm8k"], temperature=1.0, walk={"prompts": 1}), root)["sets"]
    assert found["gsm8k"]["published"] == [{"tau": 6.25, "by": "Greedy et al.", "note": None}]
    assert found["gsm8k"]["sampled"]["published"] == [{"tau": 5.75, "by": "Sampled et al.", "note": "block 8"}]
    table = next(each for each in METHODS["dflash"].tables({"evaluate": {"sets": found}}) if each.key == "prompt-sets")
    rows = [(row["set"], row["published"], row["by"]) for row in table.rows]
    assert rows == [("gsm8k", 6.25, "Greedy et al."), ("gsm8k, T 1", 5.75, "Sampled et al. (block 8)")]


def test_a_set_that_changes_outside_data_is_seen(root: Path) -> None:
    def write(name: str, text: str) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps({"messages": text}) + "\n")

    for name in ("mine.jsonl", "data/watched.jsonl"):
        write(name, "A question")
    wanted = params("builtin:tiny", sets=["mine.jsonl", "data/watched.jsonl", "gsm8k"], walk={"prompts": 1})
    assert changed_sets(wanted, root) == [], "evaluate has not run"
    evaluate.run(wanted, root)
    assert changed_sets(wanted, root) == []
    write("data/watched.jsonl", "Another")  # DVC sees it
    assert changed_sets(wanted, root) == []
    write("mine.jsonl", "Another")
    assert changed_sets(wanted, root) == ["mine.jsonl"]
