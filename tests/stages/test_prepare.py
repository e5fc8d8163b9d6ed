"""prepare, whole: sources to a published table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dllm.config.load import parse_params
from dllm.config.params import Params
from dllm.errors import DataError
from dllm.prompts import sources
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


def test_every_file_of_a_folder_has_its_own_digest(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "chats" / name).mkdir(parents=True)
        rows = [json.dumps({"messages": f"{name} {n}"}) + "\n" for n in range(20)]
        (tmp_path / "chats" / name / "x.jsonl").write_text("".join(rows))
    prepare.run(params({"name": "chats"}), tmp_path)
    record = json.loads((tmp_path / "out/prepare/run.json").read_text())
    inputs = record["inputs"]
    assert set(inputs) == {"chats/a/x.jsonl", "chats/b/x.jsonl"} and len(set(inputs.values())) == 2
    (tmp_path / "chats/a/x.jsonl").write_text(rows[0])
    prepare.run(params({"name": "chats"}), tmp_path)
    again = json.loads((tmp_path / "out/prepare/run.json").read_text())
    assert again["fingerprint"] != record["fingerprint"], "the first of the two files counts too"


def test_a_dataset_s_identity_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    # An absolute folder that `datasets` loads as it loads a hub id; the commit itself takes the network.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repo").mkdir()
    rows = [json.dumps({"messages": [{"role": "user", "content": str(n)}]}) + "\n" for n in range(20)]
    (tmp_path / "repo/train.jsonl").write_text("".join(rows))
    monkeypatch.setattr(sources, "find", lambda source, root: sources.HUB)
    prepare.run(params({"name": str(tmp_path / "repo")}), tmp_path)
    record = json.loads((tmp_path / "out/prepare/run.json").read_text())
    assert record["inputs"] == {} and record["identity"][f"{tmp_path / 'repo'}@train"]["fingerprint"]
