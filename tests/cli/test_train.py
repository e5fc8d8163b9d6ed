"""`train --dry-run`: what a run would cost, on which machine, and what has no room."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from dllm.cli.app import app
from dllm.config import recipe_book
from dllm.errors import ConfigError, ModelError, StageError
from dllm.models.known_targets import KNOWN
from tests.responses.shard_folder import write_rows
from tests.stages.test_train import answer


def dllm(root: Path, *words: object) -> None:
    line = ["train", "--root", str(root), *map(str, words)]
    typer.main.get_command(app).main(args=line, standalone_mode=False)


def table(printed: str) -> dict[str, str]:
    return {key.strip(): value.strip() for key, value in re.findall(r"│ (\S.*?) │ (.*) │", printed)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    recipe_book.activate("tiny-dflash", tmp_path / "params.yaml")
    return tmp_path


@pytest.mark.parametrize("name", [name for name in recipe_book.names() if re.match("qwen3-|smollm2-|tiny-", name)])
def test_every_recipe_whose_shapes_are_known_is_planned(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_book.activate(name, tmp_path / "params.yaml")
    dllm(tmp_path, "--dry-run", "--on", "h200")
    found = table(capsys.readouterr().out)
    assert float(found["FLOPs in all"]) > 0 and found["assumed share of the bf16 peak"] == "40%"
    ranks = recipe_book.load(name).train.nproc
    hours = [float(found[f"hours on {ranks} × {device}"]) for device in ("H100 (80 GB)", "H200 (141 GB)")]
    assert hours[0] == hours[1] == pytest.approx(float(found["FLOPs in all"]) / (0.4 * 989e12 * 3600 * ranks), rel=0.01)
    assert not (tmp_path / "work").exists() and not (tmp_path / "out").exists()


def test_a_run_without_room_is_refused_after_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe_book.activate("qwen3-8b-dflash", tmp_path / "params.yaml")
    with pytest.raises(
        StageError, match=r"a rank needs [\d.]+ GiB, [\d.]+ of them for .*, and has 74.5 \(H100"
    ) as raised:
        dllm(tmp_path, "--dry-run", "--on", "h100", "--set", "train.batch_size=32")
    found = table(capsys.readouterr().out)
    assert len(str(raised.value)) < 300 and found["parameters, draft"] == "1,048,626,432"
    assert found["rows"].startswith("778,090 of 3,072 tokens"), "sources of one name are added up"
    needed, room = map(float, re.findall(r"[\d.]+", found["GiB per rank at the most"])[:2])
    parts = [float(size) for name, size in found.items() if name.startswith("GiB per rank, ")]
    assert room == 74.5 < needed == pytest.approx(sum(parts), abs=0.2) and len(parts) >= 3
    assert float(found["tokens"]) == pytest.approx(778_090 * 3_072 * 6, rel=0.01)


def test_what_this_machine_has_is_the_measure_where_no_device_is_named(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    dllm(root, "--dry-run")
    needed = float(re.findall(r"[\d.]+", table(capsys.readouterr().out)["GiB per rank at the most"])[0])
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=int(needed / 4 * 2**30)))
    with pytest.raises(StageError, match=r"a rank needs [\d.]+ GiB, .* and has [\d.]+ \("):
        dllm(root, "--dry-run")


def test_rows_are_those_of_the_responses_if_they_are_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dllm(root, "--dry-run", "--rows", 1000, "--length", 100)
    given = table(capsys.readouterr().out)
    assert given["rows"] == "1,000 of 100 tokens (--rows)" and given["steps"] == "500 in 2 epochs, on 1 rank"
    (root / "out" / "regenerate").mkdir(parents=True)
    rows = [answer(i, "train") for i in range(10)]
    write_rows(rows, root / "out" / "regenerate", shard_size=20, about={})
    dllm(root, "--dry-run")
    mean = sum(len(row.prompt_ids) + len(row.answer_ids) for row in rows) / 10
    assert table(capsys.readouterr().out)["rows"] == f"10 of {mean:,.0f} tokens (out/regenerate)"


def test_a_target_may_be_given_by_its_config(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config: dict[str, Any] = {**KNOWN["Qwen/Qwen3-4B"], "num_hidden_layers": 12}
    (root / "config.json").write_text(json.dumps(config))
    words = ["--dry-run", "--on", "h100", "--set", "target.model=no/such"]
    dllm(root, *words, "--target-config", root / "config.json")
    assert table(capsys.readouterr().out)["parameters, target, frozen"] == "1,600,128,512"
    (root / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelError, match="no config of a causal model"):
        dllm(root, *words, "--target-config", root / "config.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dry-run", "--on", "b200"], "no device 'b200' is known"),
        (["--on", "h100"], "with --dry-run only"),
        (["--rows", "3"], "with --dry-run only"),
        (["--share-of-peak", "0.3"], "with --dry-run only"),
        (["--dry-run", "--set", "prepare.sources=[{name: no/such}]"], "number of prompts is not known"),
    ],
)
def test_wrong_calls_are_one_line(root: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dllm(root, *words)
