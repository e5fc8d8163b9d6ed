"""The standalone command, whole: any input to a folder of shards, against a server on loopback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dllm import __main__ as command
from dllm import files
from dllm.responses import merge, shards, verify
from tests.engines.openai.loopback_server import LoopbackServer, serving
from tests.regeneration.full_disk import full_disk_after

CHATS = 30


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DLLM_TARGET_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    lines = []
    for n in range(CHATS):
        messages = [{"role": "system", "content": "Be brief."}] * (n % 2)
        for turn in range(n % 3):
            messages += [{"role": "user", "content": f"{n}/{turn}"}, {"role": "assistant", "content": "old"}]
        lines.append({"messages": [*messages, {"role": "user", "content": f"question {n}"}]})
    lines += [lines[0], {"messages": [{"role": "assistant", "content": "nobody asked"}]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


TURNS = sum(n % 3 + 1 for n in range(CHATS))


def call(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        command.main(["regenerate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def flags(chats: Path, output: Path, server: LoopbackServer, *more: object) -> list[object]:
    words = ["--input-data", chats, "--output-dir", output, "--model", "builtin:tiny", "--target-server", server.url]
    return [*words, "--temperature", 0, "--max-new-tokens", 6, "--shard-size", 8, *more]


def complaint(err: str) -> str:
    """Pick the one line that says what is wrong."""
    (line,) = [line for line in err.splitlines() if line.startswith("dllm: ")]
    return line


def content(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.suffix in (".parquet", ".jsonl")}


def test_it_answers_every_turn_and_says_how(chats: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    with serving() as server:
        server.reports = {"/model_info": {"model_path": "/models/tiny", "weight_version": "7"}}
        code, out, err = call(*flags(chats, output, server, "--json", "--reasoning", "disable"), capsys=capsys)
    assert code == 0, err
    figures = json.loads(out)
    assert figures["rows"] == TURNS == figures["asked"] and figures["prompts"] == CHATS
    assert sorted(path.name for path in output.iterdir()) == [
        ".lock", ".work", "manifest.json", "rejected.jsonl", *(f"shard-{n:05d}.parquet" for n in range(4)),
    ]  # fmt: skip
    manifest = shards.read_manifest(output)
    assert manifest["made"]["served"]["model_path"] == "/models/tiny"
    assert manifest["made"]["read"] == {
        "rows": CHATS + 2, "prompts": CHATS, "other_parts": 0, "duplicates": 1, "over_limit": 0,
        "refused": {"no user turn": 1},
    }  # fmt: skip
    assert manifest["thinking"] == "off" and manifest["template"] and manifest["sampling"]["temperature"] == 0
    assert manifest["made"]["seconds"] > 0 and manifest["made"]["versions"]["dllm"]
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in server.bodies)
    rows = shards.read_rows(output)
    third = next(row for row in rows if row.messages[-2]["content"] == "question 2")
    assert (
        third.turn == 2 and [m["content"][:8] for m in third.messages if m["role"] == "assistant"] == ["you said"] * 3
    )
    verify.verify(output)


def test_what_is_not_empty_is_left_alone_and_resumed_when_asked(chats: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with serving() as server:
        code, _, err = call(*flags(chats, output, server), capsys=capsys)
        assert code == 5 and "not empty: it holds mine.txt" in complaint(err) and server.bodies == []
        assert [path.name for path in output.iterdir()] == ["mine.txt"]
        (output / "mine.txt").unlink()
        assert call(*flags(chats, output, server), capsys=capsys)[0] == 0
        before, manifest = content(output), (output / "manifest.json").read_bytes()
        assert call(*flags(chats, output, server), capsys=capsys)[0] == 5
        asked = len(server.bodies)
        assert call(*flags(chats, output, server, "--resume"), capsys=capsys)[0] == 0
        assert len(server.bodies) == asked and (output / "manifest.json").read_bytes() == manifest
        (output / "shard-00001.parquet").unlink()
        assert call(*flags(chats, output, server, "--resume"), capsys=capsys)[0] == 0
    assert len(server.bodies) == asked and content(output) == before


@pytest.mark.parametrize("name", ["shard-00000.parquet", "manifest.json", "rejected.jsonl"])
def test_no_file_is_replaced_that_no_earlier_call_has_written(
    chats: Path, tmp_path: Path, capsys: Any, name: str
) -> None:
    output = tmp_path / "data"
    output.mkdir()
    (output / name).write_bytes(b"precious")
    (output / "notes.txt").write_text("beside it")
    with serving() as server:
        code, _, err = call(*flags(chats, output, server, "--resume"), capsys=capsys)
        assert code == 5 and f"nothing to resume here, and {name}" in complaint(err)
        assert sorted(path.name for path in output.iterdir()) == sorted([name, "notes.txt"]) and server.bodies == []
        assert (output / name).read_bytes() == b"precious"
        (output / name).rename(tmp_path / name)
        assert call(*flags(chats, output, server, "--resume"), capsys=capsys)[0] == 0
        shard = output / "shard-00000.parquet"
        before = shard.read_bytes()
        code, _, err = call(*flags(shard, output, server, "--resume"), capsys=capsys)
        assert code == 2 and "--input-data lies in --output-dir" in complaint(err) and shard.read_bytes() == before
        shutil.rmtree(output / ".work")  # a copy of the result alone can be gone on with
        assert call(*flags(chats, output, server, "--resume"), capsys=capsys)[0] == 0
    verify.verify(output)


def test_a_result_that_is_completed_later_counts_the_time_of_all_calls(
    chats: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "out"
    with serving() as server:
        server.faults.extend([(500, {})] * 2)
        few = flags(chats, output, server, "--concurrency", 1, "--max-retries", 0)
        assert call(*few, capsys=capsys)[0] == 0
        first = shards.read_manifest(output)
        assert first["rejected"] == 2
        assert call(*few, "--resume", capsys=capsys)[0] == 0
    last = shards.read_manifest(output)
    assert last["rejected"] == 0 and last["made"]["started"] == first["made"]["started"]
    assert last["made"]["seconds"] > first["made"]["seconds"]
    verify.verify(output)


def test_a_changed_flag_starts_anew_and_the_old_result_stays_until_then(
    chats: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "out"
    with serving() as server:
        assert call(*flags(chats, output, server), capsys=capsys)[0] == 0
        old = content(output)
        server.always = (500, {})
        changed = flags(chats, output, server, "--resume", "--seed", 1)
        code, _, err = call(*changed, "--max-retries", 0, "--max-failure-rate", 0.1, "--timeout-s", 1, capsys=capsys)
        assert code == 4 and "starting anew beside it" in err
        assert content(output) == old
        verify.verify(output)
        server.always = None
        server.settle()
        asked = len(server.bodies)
        code, _, err = call(*changed, "--concurrency", 3, capsys=capsys)
        assert code == 0 and len(server.bodies) - asked == TURNS
    assert shards.read_manifest(output)["sampling"]["seed"] == 1
    assert len(list((output / ".work").iterdir())) == 1, "the older finished work is let go"


def test_refused_rows_are_set_aside_with_their_reasons(chats: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    with serving() as server:
        server.faults.extend([(400, {})] * 3)
        code, _, err = call(*flags(chats, output, server, "--concurrency", 1), capsys=capsys)
    assert code == 0 and "3 refused" in err
    refused = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert len(refused) == 3 and all("400" in each["reason"] and each["turn"] == 0 for each in refused)
    verify.verify(output)


def test_a_second_process_is_refused(chats: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with serving() as server, files.lock_folder(output):
        for more in ((), ("--resume",)):
            code, _, err = call(*flags(chats, output, server, *more), capsys=capsys)
            assert code == 5 and f"another process works on this (pid {os.getpid()})" in complaint(err)
    assert server.bodies == []


def test_a_full_disk_is_one_line_and_the_work_goes_on_afterwards(chats: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    with serving() as server:
        with full_disk_after(20):
            code, _, err = call(*flags(chats, output, server, "--concurrency", 1), capsys=capsys)
            assert code == 5 and "disk is full" in complaint(err)
        code, out, _ = call(*flags(chats, output, server, "--resume", "--json"), capsys=capsys)
    assert code == 0 and json.loads(out)["asked"] == TURNS - 20
    verify.verify(output)


def test_parts_together_are_the_whole(chats: Path, tmp_path: Path, capsys: Any) -> None:
    with serving() as server:
        assert call(*flags(chats, tmp_path / "whole", server), capsys=capsys)[0] == 0
        for part in range(3):
            assert call(*flags(chats, tmp_path / f"p{part}", server, "--part", f"{part}/3"), capsys=capsys)[0] == 0
    merge.merge([tmp_path / f"p{part}" for part in (1, 0, 2)], tmp_path / "merged")
    verify.verify(tmp_path / "merged")

    def rows(folder: str) -> list[Any]:
        return sorted(shards.read_rows(tmp_path / folder), key=lambda row: (row.prompt_id, row.sample, row.turn))

    assert rows("merged") == rows("whole")


def test_a_dry_run_counts_renders_and_meets_the_server_and_writes_nothing(
    chats: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "out"
    with serving() as server:
        code, out, _ = call(*flags(chats, output, server, "--dry-run"), capsys=capsys)
        assert code == 0 and f"{TURNS} requests for {CHATS} samples" in out and "question 0" in out
        assert "1 duplicates, 1 refused: no user turn" in out
        code, out, _ = call(*flags(chats, output, server, "--dry-run", "--json"), capsys=capsys)
        assert json.loads(out)["requests"] == TURNS
        server.model = "another"
        code, _, err = call(*flags(chats, output, server, "--dry-run"), capsys=capsys)
        assert code == 4 and "serves another, not builtin:tiny" in complaint(err)
    assert server.bodies == [] and not output.exists()


def test_samples_and_the_split_are_marked(chats: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    more = (
        "--temperature",
        0.8,
        "--samples-per-prompt",
        2,
        "--heldout-fraction",
        0.3,
        "--limit",
        10,
        "--turns",
        "last",
    )
    with serving() as server:
        assert call(*flags(chats, output, server, *more), capsys=capsys)[0] == 0
    rows = shards.read_rows(output)
    splits = {split: [row for row in rows if row.split == split] for split in ("train", "heldout")}
    assert len({row.prompt_id for row in rows}) == 10 and splits["heldout"]
    assert {row.sample for row in splits["heldout"]} == {0} and {row.sample for row in splits["train"]} == {0, 1}
    assert {row.turn for row in rows} == {0, 1, 2} and "old" in str([row.messages for row in rows])


BAD = [
    (["--output-dir", "out"], 2, "--model"),
    (["--model", "builtin:tiny"], 2, "--output-dir"),
    (["--output-dir", "out", "--model", "builtin:tiny", "--params", "p.yaml"], 2, "--params does not go with"),
    (["--output-dir", "out", "--model", "builtin:tiny", "--part", "3/3"], 2, "I from 0 to N - 1"),
    (["--output-dir", "out", "--model", "builtin:tiny", "--drop", "boring"], 2, "regenerate.drop"),
    (
        ["--output-dir", "out", "--model", "builtin:tiny", "--temperature", "0", "--samples-per-prompt", "2"],
        2,
        "repeats",
    ),
    (["--output-dir", "out", "--model", "builtin:tiny", "--engine", "openai"], 2, "needs a server"),
    (
        ["--output-dir", "out", "--model", "builtin:tiny", "--engine", "local", "--target-server", "x"],
        2,
        "uses no server that is running",
    ),
    *(
        (
            ["--output-dir", "out", "--model", "builtin:tiny", *chosen, flag, "1"],
            2,
            f"has no effect with engine {chosen[-1]} ({flag}); leave it out",
        )
        for chosen, given in {
            ("--engine", "local"): ("--concurrency", "--timeout-s", "--max-retries"),
            ("--engine", "dataset"): ("--temperature", "--top-p", "--seed", "--batch-size", "--concurrency"),
            ("--engine", "sglang"): ("--batch-size",),
            ("--target-server", "http://127.0.0.1:9", "--engine", "openai"): ("--batch-size",),
        }.items()
        for flag in given
    ),
    (["--output-dir", ".", "--model", "builtin:tiny", "--input-data", "."], 2, "lies in the input"),
    (["--output-dir", "out", "--model", "builtin:tiny", "--input-data", "nowhere.jsonl"], 3, "no such file"),
    (["--output-dir", "out", "--model", "builtin:tiny", "--messages-column", "chat"], 3, "no chat in the row"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), BAD, ids=[" ".join(arguments) for arguments, _, _ in BAD])
def test_bad_flags_are_one_line(
    arguments: list[str], code: int, said: str, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(tmp_path)]
    got, _, err = call("--input-data", "chats.jsonl", *arguments, *root, capsys=capsys)
    assert got == code and said in complaint(err), err
    assert not list(tmp_path.rglob("shard-*"))


def test_flags_of_the_command_alone_need_an_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call("--root", tmp_path, "--limit", 3, capsys=capsys)
    assert code == 2 and "--limit needs --input-data" in complaint(err)


def test_an_mlflow_run_is_left_where_a_store_is_named(
    chats: Path, tmp_path: Path, mlflow_store: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    with serving() as server:
        assert call(*flags(chats, tmp_path / "out", server), capsys=capsys)[0] == 0
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=mlflow_store)
    experiment = client.get_experiment_by_name("regenerate")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics["rows"] == TURNS
