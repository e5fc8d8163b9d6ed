"""The end table: complete, honest about what is missing, and readable where there is no terminal."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from dllm.config import recipe_book
from dllm.config.load import parse_params
from dllm.digests import sealed
from dllm.errors import DataError, StageError
from dllm.methods.figures import DASH
from dllm.registry import METHODS
from dllm.report import terminal
from dllm.stages import STAGES, evaluate, prepare, regenerate, register, train
from tests.arch.source_tree import ROOT


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every stage once: the report is tested on the records that they write."""
    root = tmp_path_factory.mktemp("finished")
    raw = yaml.safe_load(recipe_book.text("tiny-dflash"))
    raw["prepare"]["sources"][0]["limit"] = 24
    raw["regenerate"]["max_new_tokens"] = 8
    raw["train"]["epochs"] = 1
    raw["evaluate"] |= {"num_prompts": 1, "max_new_tokens": 8, "identity_prompts": 1}
    params = parse_params(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        for stage in (prepare, regenerate, train, evaluate, register):
            stage.run(params, root)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """Copy the records of a whole run."""
    keep = shutil.ignore_patterns("*.parquet", "*.safetensors")
    shutil.copytree(finished / "out", tmp_path / "out", ignore=keep)
    return tmp_path


def _record(root: Path, stage: str, file: str = "metrics.json") -> dict:
    return json.loads((root / "out" / stage / file).read_text())


def _change(root: Path, stage: str, file: str = "metrics.json", **values: object) -> None:
    """Change a record as if its stage had written these values: with the digests and seal that belong to them."""
    path, run = root / "out" / stage / file, _record(root, stage, "run.json")
    if file == "run.json":
        run |= values
    else:
        path.write_text(json.dumps({**_record(root, stage, file), **values}))
        run["outputs"][file] = hashlib.sha256(path.read_bytes()).hexdigest()
    run.pop("seal", None)
    (root / "out" / stage / "run.json").write_bytes(sealed(run))


def _printed(root: Path, **settings: object) -> str:
    text = io.StringIO()
    terminal.print_report(root, Console(file=text, **settings))  # type: ignore[arg-type]
    return text.getvalue()


def _row(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if name in line]
    return line


def test_the_table_tells_the_whole_run(root: Path) -> None:
    text = _printed(root)
    assert "tiny-dflash" in text.splitlines()[0]
    answered, trained, found = (_record(root, stage) for stage in ("regenerate", "train", "evaluate"))
    expected = {
        "prompts regenerated": f"{answered['prompts']} ({answered['rows']} responses)",
        "tokens regenerated": f"{answered['tokens']:,}",
        "tokens per response": f"{answered['tokens'] / answered['rows']:.1f}, {answered['cut_share']:.0%} cut",
        "optimizer steps": f"{trained['steps']} (best at {trained['best_step']})",
        "draft parameters": f"{trained['draft_params']:,}",
        "draft_acc, held-out": f"{trained['val_draft_acc']:.3f}",
        f"τ micro, {found['prompts']} decoded": f"{found['tau_micro']:.2f}",
        f"τ micro, {found['walked']['prompts']} held-out": f"{found['walked']['tau_micro']:.2f} (95 % interval ",
        "τ macro": f"{found['tau_macro']:.2f}",
        "tokens/s autoregressive": f"{found['tokens_per_s_ar']:.1f}",
        "tokens/s speculative": f"{found['tokens_per_s_spec']:.1f}",
        "speculative / autoregressive": f"{found['speedup']:.2f} ×",
        "same ids as greedy": "yes",
        "registered": "tiny-dflash version 1 @challenger, @champion",
        "champion?": "champion: the first version",
        "plots": "out/evaluate/evaluation.png, out/train/curves.png",
        "more": "make ui",
        "in a shell": "`. infra/env.sh` puts its python, dvc and prefect on the path ",
    }
    for name, value in expected.items():
        assert value in _row(text, name), name


@pytest.mark.parametrize(
    ("best", "from_on", "said"),
    [
        ({"1": 7, "8": 2}, None, "drafts pay at every concurrency measured"),
        ({"1": 7, "8": 0}, 8, "drafts lose from 8 on"),
        ({"1": 7, "2": 0, "8": 2}, None, "drafts lose at 2"),
    ],
)
def test_where_drafts_lose_is_said(best: dict[str, int], from_on: int | None, said: str) -> None:
    row = {str(k): 100.0 for k in range(8)}
    found = {"tokens_per_s": dict.fromkeys(best, row), "best_draft_tokens": best, "loses_from_concurrency": from_on}
    (table,) = [t for t in METHODS["dflash"].tables({"evaluate": {"throughput": found}}) if t.key == "throughput"]
    assert table.description.endswith(f": {said}.")


def test_each_source_has_a_row_and_many_draft_tokens_fit(root: Path) -> None:
    walked = _record(root, "evaluate")["walked"]
    source = {"prompts": 7, "tau_micro": 1.5, "tau_interval": [1.4, 1.6]}
    tokens_per_s = {str(k): 100.0 + k for k in range(16)}
    throughput = {
        "tokens_per_s": {"1": tokens_per_s, "32": tokens_per_s},
        "best_draft_tokens": {"1": 11, "32": 3},
        "loses_from_concurrency": None,
        "predicted_speedup": 1.0,
    }
    by_source = {"a": source, "b": source | {"tau_interval": None}}
    _change(root, "evaluate", walked=walked | {"by_source": by_source}, throughput=throughput)
    text = _printed(root)
    lines = [line.split() for line in text.splitlines()]
    assert ["│", "│", "a", "7", "1.50", "1.40", "1.60", "│"] in lines and [
        "│",
        "│",
        "b",
        "7",
        "1.50",
        DASH,
        DASH,
        "│",
    ] in lines
    (head,) = [line for line in lines if "once" in line]
    numbers = ["0", "1", "2", "3", "4", "8", "11", "15"]
    assert head[head.index("once") + 1 : head.index("best")] == numbers, "powers of two, the best and the last"
    assert "…" not in text.split("draft tokens that pay")[1]


def test_the_curve_has_one_row_per_offset(root: Path) -> None:
    reached, given = [0.53, 0.26, 0.12], [0.53, 0.49, None]
    found = _record(root, "evaluate")["walked"]
    assert len(found["acceptance_by_offset"]) == len(found["conditional_acceptance_by_offset"]) == 3
    found |= {"acceptance_by_offset": reached, "conditional_acceptance_by_offset": given}
    _change(root, "evaluate", walked=found)
    lines = _printed(root).splitlines()
    start = next(number for number, line in enumerate(lines) if "draft_acc_k" in line)
    rows = [line.split("│")[2].split() for line in lines[start + 1 : start + 4]]
    accuracies = [f"{_record(root, 'train')[f'val_draft_acc_k{k}']:.3f}" for k in (1, 2, 3)]
    assert rows == [
        ["1", accuracies[0], "0.530", "0.530", "█" * 11],
        ["2", accuracies[1], "0.490", "0.260", "█" * 5],
        ["3", accuracies[2], DASH, "0.120", "█" * 2],
    ]


def test_each_stage_shows_its_seconds_and_its_run(root: Path) -> None:
    for number, stage in enumerate(STAGES, start=1):
        git = {"commit": "c0ffee" * 6, "dirty": stage == "train"}
        _change(root, stage, "run.json", seconds=100.5 * number, mlflow_run_id=f"{number}" * 32, git=git)
    text = _printed(root)
    assert _row(text, "3" * 12).split("│")[2].split() == ["train", "301.5", "3" * 12, "c0ffeec0", "+", "edits"]
    assert f"{100.5 * 15:.1f}" in _row(text, " all ")


@pytest.mark.parametrize("missing", STAGES)
def test_a_stage_that_has_not_run_leaves_dashes(root: Path, missing: str) -> None:
    shutil.rmtree(root / "out" / missing)
    text = _printed(root)
    assert DASH in text
    if missing == "evaluate":
        assert DASH in _row(text, "τ micro")
        first = f"{_record(root, 'train')['val_draft_acc_k1']:.3f}"
        assert first in text.split("by offset in the block")[1], "the curve on text is there without decoding"


@pytest.mark.parametrize(
    "identity", [None, {}, {"target": {}}, {"method": "a method of a package that is gone"}], ids=str
)
def test_a_run_that_names_no_known_method_has_a_report(root: Path, identity: dict | None) -> None:
    for stage in ("train", "evaluate"):
        _change(root, stage, "run.json", identity=identity)
    text = _printed(root)
    assert "tokens regenerated" in text and "optimizer steps" in text and "τ" not in text


def test_ids_that_differ_from_greedy_stand_out(root: Path) -> None:
    _change(root, "evaluate", greedy_identical=False, walk_identical=False)
    printed = _printed(root)
    assert "NO" in _row(printed, "same ids as greedy") and "NO" in _row(printed, "same rounds walked")


def test_no_line_is_wider_than_100_columns(root: Path) -> None:
    for settings in ({}, {"width": 250, "force_terminal": True, "color_system": None}):
        assert max(len(line) for line in _printed(root, **settings).splitlines()) <= terminal.WIDTH


def test_a_pipe_gets_plain_text(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dllm", "report", "--root", str(root)],
        cwd=ROOT,
        capture_output=True,
        check=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
    )
    assert b"\x1b" not in done.stdout
    tau = f"{_record(root, 'evaluate')['tau_micro']:.2f}"
    assert tau.encode() in done.stdout and done.stderr == b""


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no stage has run"):
        terminal.print_report(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_record_is_named(root: Path, text: str) -> None:
    (root / "out" / "train" / "metrics.json").write_text(text)
    with pytest.raises(DataError, match=r"out/train/metrics\.json"):
        terminal.print_report(root)
