"""The end table: complete, honest about what is missing, and readable where there is no terminal."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dllm.cli import report
from dllm.errors import DataError, StageError
from tests.arch.source_tree import ROOT

METRICS = {
    "prepare": {"sources": {}},
    "regenerate": {"prompts": 1513, "rows": 3026, "tokens": 230111, "seconds": 300.0},
    "train": {
        "draft_params": 8712345,
        "steps": 900,
        "best_step": 800,
        "val_draft_acc": 0.4912,
        "val_draft_acc_k1": 0.71,
        "val_draft_acc_k2": 0.52,
        "val_draft_acc_k3": 0.33,
    },
    "evaluate": {
        "tau_micro": 2.0912,
        "tau_macro": 2.1134,
        "tokens_per_s_ar": 35.21,
        "tokens_per_s_spec": 52.44,
        "speedup": 1.4894,
        "greedy_identical": True,
        "acceptance_by_offset": [0.53, 0.26, 0.12],
        "conditional_acceptance_by_offset": [0.53, 0.49, None],
    },
    "register": {
        "model_name": "smollm2-135m-dflash",
        "version": 7,
        "aliases": ["challenger", "champion"],
        "verdict": "champion: τ 2.091 beats version 6's 2.000",
    },
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Lay out the records of a whole run."""
    for number, (stage, metrics) in enumerate(METRICS.items(), start=1):
        folder = tmp_path / "out" / stage
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(metrics))
        run = {
            "recipe": "smollm2-135m-dflash",
            "seconds": 100.5 * number,
            "mlflow_run_id": f"{number}" * 32,
            "git": {"commit": "c0ffee" * 6, "dirty": stage == "train"},
        }
        (folder / "run.json").write_text(json.dumps(run))
    (tmp_path / "out" / "evaluate" / "acceptance.png").touch()
    return tmp_path


def _printed(root: Path, **settings: object) -> str:
    text = io.StringIO()
    report.print_report(root, Console(file=text, **settings))  # type: ignore[arg-type]
    return text.getvalue()


def _row(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if name in line]
    return line


def test_the_table_tells_the_whole_run(root: Path) -> None:
    text = _printed(root)
    assert "smollm2-135m-dflash" in text.splitlines()[0]
    expected = {
        "prompts regenerated": "1,513 (3,026 answers)",
        "tokens regenerated": "230,111",
        "draft parameters": "8,712,345",
        "optimizer steps": "900 (best at 800)",
        "draft_acc, held-out": "0.491",
        "τ micro": "2.09",
        "τ macro": "2.11",
        "tokens/s autoregressive": "35.2",
        "tokens/s speculative": "52.4",
        "speculative / autoregressive": "1.49 ×",
        "same ids as greedy": "yes",
        "registered": "smollm2-135m-dflash version 7 @challenger, @champion",
        "champion?": "τ 2.091 beats version 6's 2.000",
        "plots": "out/evaluate/acceptance.png",
        "look closer": "make ui",
    }
    for name, value in expected.items():
        assert value in _row(text, name), name


def test_the_curve_has_one_row_an_offset(root: Path) -> None:
    lines = _printed(root).splitlines()
    start = next(number for number, line in enumerate(lines) if "draft_acc_k" in line)
    rows = [line.split("│")[2].split() for line in lines[start + 1 : start + 4]]
    assert rows == [
        ["1", "0.710", "0.530", "0.530", "█" * 11],
        ["2", "0.520", "0.490", "0.260", "█" * 5],
        ["3", "0.330", report.DASH, "0.120", "█" * 2],
    ]


def test_a_diffusion_model_has_one_row_a_way_of_writing(root: Path) -> None:
    ways = [("one token a pass", 1.0, 1.0, 0.99, 28.6), ("threshold 0.9", 0.996, None, 84.33, 2204.0)]
    names = ("way", "words_exact", "answers_exact", "tokens_per_pass", "tokens_per_s")
    found = {"nelbo": 0.1426, "nelbo_se": 0.002, "decodings": [dict(zip(names, way, strict=True)) for way in ways]}
    (root / "out" / "evaluate" / "metrics.json").write_text(json.dumps(found))
    text = _printed(root)
    assert "0.1426 ± 0.0020 nats a token" in _row(text, "bound on held-out answers")
    assert _row(text, "one token a pass").split("│")[2].split()[-4:] == ["1.000", "1.000", "0.99", "28.6"]
    assert _row(text, "threshold 0.9").split("│")[2].split()[-4:] == ["0.996", report.DASH, "84.33", "2204.0"]
    assert "τ micro" not in text


def test_each_stage_shows_its_seconds_and_its_run(root: Path) -> None:
    text = _printed(root)
    assert _row(text, "3" * 12).split("│")[2].split() == ["train", "301.5", "3" * 12, "c0ffeec0", "+", "edits"]
    assert f"{100.5 * 15:.1f}" in _row(text, " all ")


@pytest.mark.parametrize("missing", list(METRICS))
def test_a_stage_that_has_not_run_leaves_dashes(root: Path, missing: str) -> None:
    for file in (root / "out" / missing).iterdir():
        file.unlink()
    text = _printed(root)
    assert report.DASH in text
    if missing == "evaluate":
        assert report.DASH in _row(text, "τ micro")
        assert "0.710" in text, "the curve on text is there without decoding"


def test_ids_that_differ_from_greedy_stand_out(root: Path) -> None:
    path = root / "out" / "evaluate" / "metrics.json"
    path.write_text(json.dumps({**METRICS["evaluate"], "greedy_identical": False}))
    assert "NO" in _row(_printed(root), "same ids as greedy")


def test_no_line_is_wider_than_100_columns(root: Path) -> None:
    for settings in ({}, {"width": 250, "force_terminal": True, "color_system": None}):
        assert max(len(line) for line in _printed(root, **settings).splitlines()) <= report.WIDTH


def test_a_pipe_gets_plain_text(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dllm", "report", "--root", str(root)],
        cwd=ROOT,
        capture_output=True,
        check=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
    )
    assert b"\x1b" not in done.stdout
    assert b"2.09" in done.stdout and done.stderr == b""


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no stage has run"):
        report.print_report(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_record_is_named(root: Path, text: str) -> None:
    (root / "out" / "train" / "metrics.json").write_text(text)
    with pytest.raises(DataError, match=r"out/train/metrics\.json"):
        report.print_report(root)
