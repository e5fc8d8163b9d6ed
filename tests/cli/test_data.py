"""`data verify`, `data show` and `data merge` as typed: what is printed, and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dllm import __main__ as command
from dllm.config.params import Target
from dllm.models.targets import load_tokenizer
from dllm.prompts import template as chat
from tests.cli.test_show import row
from tests.responses.shard_folder import write_rows
from tests.responses.test_merge import part


def call(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        command.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err


@pytest.fixture(autouse=True)
def _process_settings_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal
    import sys

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Target(model="builtin:tiny"))


@pytest.fixture
def folder(tokenizer, tmp_path: Path) -> Path:
    about = {"target": {"model": "builtin:tiny"}, "template": chat.template_digest(tokenizer)}
    write_rows([row(tokenizer, n) for n in range(5)], tmp_path, 2, about)
    return tmp_path


def test_verify_prints_a_table_or_json_and_leaves_with_3_at_damage(folder: Path, capsys) -> None:
    code, out, err = call("data", "verify", folder, capsys=capsys)
    assert (code, err) == (0, "") and "is whole" in out
    assert all(word in out for word in ("manifest", "sha256", "5, each (prompt, sample, turn) once", "counts"))
    code, out, _ = call("data", "verify", folder, "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["checked"]["shards"].startswith("3,")
    (folder / "shard-00001.parquet").write_bytes(b"PAR1")
    code, out, err = call("data", "verify", folder, capsys=capsys)
    assert (code, out) == (3, "") and err.count("\n") == 1 and "shard-00001.parquet" in err
    assert call("data", "verify", folder / "nowhere", capsys=capsys)[0] == 3


def test_show_prints_the_first_rows_in_brackets_where_there_is_no_terminal(folder: Path, capsys) -> None:
    code, out, err = call("data", "show", folder, capsys=capsys)
    assert (code, err) == (0, "") and out.count("[zwölf [or so]<|im_end|>]") == 3
    code, out, _ = call("data", "show", folder, "--row", "4", capsys=capsys)
    assert out.startswith("row 4 · prompt 0000000000000004 sample 0 turn 0 · train · s · stop")
    code, out, _ = call("data", "show", folder, "--prompt", f"{3:016x}", "--tokens", "--limit", "1", capsys=capsys)
    assert code == 0 and "'<|im_end|>'" in out and out.count("row ") == 1
    code, _, err = call("data", "show", folder, "--row", "5", capsys=capsys)
    assert code == 3 and "no row 5 among 5 rows" in err


def test_show_takes_another_tokenizer_and_says_where_that_one_speaks_otherwise(
    tokenizer, tmp_path: Path, capsys
) -> None:
    write_rows([row(tokenizer)], tmp_path, 2, {"target": {"model": "/no/such/model"}, "template": "another"})
    code, _, err = call("data", "show", tmp_path, capsys=capsys)
    assert code == 6 and "/no/such/model" in err and "--model" in err and err.count("\n") == 1
    code, out, err = call("data", "show", tmp_path, "--model", "builtin:tiny", capsys=capsys)
    assert code == 0 and "[zwölf" in out and "another chat template" in err


def test_merge_makes_one_folder_of_parts(tmp_path: Path, capsys) -> None:
    parts = [part(tmp_path / str(number), number, of=2) for number in (0, 1)]
    code, out, _ = call("data", "merge", *parts, "--output-dir", tmp_path / "whole", capsys=capsys)
    assert code == 0 and "25 rows, 75 tokens of 2 parts" in out
    code, _, err = call("data", "merge", parts[0], "--output-dir", tmp_path / "other", capsys=capsys)
    assert code == 3 and "parts are missing: 1/2" in err and err.count("\n") == 1
