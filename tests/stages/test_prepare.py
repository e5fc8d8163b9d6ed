"""prepare, whole: sources to a published table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dllm.config.load import parse_params
from dllm.config.params import Params
from dllm.errors import DataError
from dllm.prompts.table import read_prompts
from dllm.stages import prepare
from dllm.stages.workspace import digest


@pytest.fixture(autouse=True)
def one_store(mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)


def params(*sources: dict[str, object]) -> Params:
    return parse_params(
        {
            "recipe": "test",
            "target": {"model": "builtin:tiny"},
            "prepare": {"sources": list(sources), "heldout_fraction": 0.3},
            "register": {"model_name": "test"},
        }
    )


def test_it_publishes_prompts_and_counts_and_again_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"messages": str(n % 20)}) + "\n" for n in range(30)))
    asked = params({"name": "aime"}, {"name": "mine.jsonl"})
    metrics = prepare.run(asked, tmp_path)
    out = tmp_path / "out/prepare"
    assert metrics["prompts"] == len(read_prompts(out)) == 50 and metrics["duplicates"] == 10
    assert json.loads((out / "metrics.json").read_text())["sources"]["aime"]["rows"] == 30
    assert "prepare: mine.jsonl: 30 rows" in capsys.readouterr().out
    before = digest(out)
    prepare.run(asked, tmp_path)
    assert digest(out) == before


def test_a_bad_line_publishes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"messages": "a"}\n{"messages": ')
    with pytest.raises(DataError, match=r"mine\.jsonl:2"):
        prepare.run(params({"name": "mine.jsonl"}), tmp_path)
    assert not (tmp_path / "out/prepare").exists()
