"""Text from outside cannot act: on a terminal, on a page, on a file in place of one of ours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.digests import unsealed
from dllm.engines import sglang
from dllm.errors import DataError, StageError
from dllm.files import LOCK, lock_folder
from dllm.outside import JsonError, harmless, markdown, one_line, parse_json, visible
from dllm.regeneration.journal import ResponseJournal
from dllm.responses import shards
from dllm.responses.shards import Row
from dllm.tracking.run_journal import RunJournal
from dllm.tracking.runs import NullTracker
from dllm.training.journal import MetricsLog
from tests.patience import LONGEST_S
from tests.responses.shard_folder import write_rows

ESCAPES = "\x1b]0;x\x07\x1b[2J\x9b31m\u202e\u2066\u200f\x00\x7f"
"""A title, a cleared screen, C1, bidi marks, NUL and DEL."""
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")


def dllm(*words: object, cwd: Path) -> tuple[int, str]:
    """Run a verb, and return its exit code and all that it printed."""
    argv = [sys.executable, "-m", "dllm", *map(str, words)]
    done = subprocess.run(
        argv, cwd=cwd, capture_output=True, timeout=LONGEST_S, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return done.returncode, (done.stdout + done.stderr).decode()


@given(st.text(st.characters(codec=None), max_size=40))
def test_a_printed_text_holds_no_control_character(text: str) -> None:
    assert not ACTS.search(visible(text)) and not ACTS.search(one_line(text)) and "\n" not in one_line(text)
    assert not ACTS.search(harmless(text, False).replace("\r", ""))
    visible(text).encode()
    assert len(one_line(text * 30, 100)) <= 100
    error = DataError(text * 30, where=text * 10, hint=text * 10)
    assert len(str(error)) <= 500 and not ACTS.search(str(error)) and "\n" not in str(error)


def test_styles_of_bars_pass_to_a_terminal_and_commands_do_not() -> None:
    assert harmless("\x1b[1mbold\x1b[0m\r", True) == "\x1b[1mbold\x1b[0m\r"
    assert harmless("\x1b]52;c;aGk=\x07", True) == "\u241b]52;c;aGk=\u2407"


def test_markdown_is_shown_and_not_rendered() -> None:
    assert markdown("[a](http://x) <b> `c` | *d*\n# e") == ("\\[a\\](http&#58;//x) &lt;b&gt; \\`c\\` \\| \\*d\\* # e")


@pytest.mark.slow
def test_escapes_in_rows_reach_no_terminal(tmp_path: Path) -> None:
    name = f"a{ESCAPES[:4]}\n.jsonl"
    row = {"messages": [{"role": "user", "content": f"hi {ESCAPES}"}], f"col{ESCAPES}": 1, "other\n": {ESCAPES: 2}}
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_text(json.dumps(row) + "\n")
    (tmp_path / "d" / f"x{ESCAPES[:4]}.txt").write_text("")
    rest = ("--output-dir", "out", "--model", "builtin:tiny", "--dry-run")
    code, out = dllm("regenerate", "--input-data", "d", *rest, cwd=tmp_path)
    assert code == 0, out
    assert not ACTS.search(out) and "\u241b" in out
    bad = {"messages": [{"role": f"wizard{ESCAPES}", "content": ESCAPES}], f"col{ESCAPES}": 1}
    (tmp_path / "bad.jsonl").write_text(json.dumps(bad) + "\n")
    code, out = dllm("regenerate", "--input-data", "bad.jsonl", *rest, cwd=tmp_path)
    assert code == 3 and "wizard" in out and not ACTS.search(out)


@pytest.mark.slow
def test_escapes_in_responses_reach_no_terminal(tmp_path: Path) -> None:
    out = tmp_path / "responses"
    out.mkdir()
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = Row("0" * 16, 0, f"s{ESCAPES}", "train", said, [1, 2], [5, 2], "stop", 2)
    write_rows([row], out, 10, {})
    path = out / shards.MANIFEST
    manifest = unsealed(path.read_bytes())
    path.write_text(json.dumps({**manifest, "target": {"model": f"builtin:tin{ESCAPES}"}}))
    code, printed = dllm("data", "show", out, cwd=tmp_path)
    assert code == 6 and not ACTS.search(printed)
    code, printed = dllm("data", "show", out, "--model", "builtin:tiny", cwd=tmp_path)
    assert code == 0 and "\u241b" in printed and not ACTS.search(printed)
    path.write_text(json.dumps({**manifest, "rows": ESCAPES, "finish_reasons": {ESCAPES: 1}}))
    code, printed = dllm("data", "verify", out, cwd=tmp_path)
    assert code == 3 and not ACTS.search(printed)


OPENED: dict[str, Callable[[Path], object]] = {
    ".lock": lambda path: lock_folder(path.parent).__enter__(),
    "journal-00000.jsonl": ResponseJournal,
    "run.jsonl": RunJournal,
    "training.jsonl": lambda path: MetricsLog(path, NullTracker()).write("train", 1, 0.1, {}),
    "server.log": lambda path: sglang._begin_log(path, ["sglang"]),
}
"""What is opened to be changed in place, by a name of it."""


@pytest.mark.parametrize("name", OPENED)
@pytest.mark.parametrize("kind", ["link", "hard link", "dangling link", "pipe", "folder"])
def test_what_stands_in_place_of_a_file_of_ours_stays_as_it_is(tmp_path: Path, kind: str, name: str) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "folder"
    folder.mkdir()
    precious.write_text("years of work\nand a tail that is none")
    path = folder / name
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "hard link":
        path.hardlink_to(precious)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "absent")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(StageError, match="a link, or no file, stands in place of"):
        OPENED[name](path)
    assert precious.read_text() == "years of work\nand a tail that is none" and not (tmp_path / "absent").exists()


def test_a_lock_is_not_changed_by_who_does_not_hold_it(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        before = (tmp_path / LOCK).read_text()
        with pytest.raises(StageError, match=f"pid {before}"), lock_folder(tmp_path):
            pass
        assert (tmp_path / LOCK).read_text() == before == str(os.getpid())


@settings(max_examples=200)
@given(st.text(max_size=30) | st.binary(max_size=30))
def test_any_text_is_json_or_one_line(text: str | bytes) -> None:
    try:
        parse_json(text)
    except JsonError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text", ["[" * 5000, "[" * 101 + "]" * 101, "1" * 5000, '{"a": NaN}', "-Infinity", b"\xff", ""]
)
def test_json_that_exhausts_a_reader_is_refused(text: str | bytes) -> None:
    with pytest.raises(JsonError):
        parse_json(text)
    assert parse_json("[" * 100 + "]" * 100)
