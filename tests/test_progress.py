"""Progress where there is no terminal, and on one."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys

import pytest

from dllm import progress
from dllm.progress import Lines, Progress, clock


def test_plain_lines_carry_share_rate_time_left_and_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    stream = io.StringIO()
    with Progress("regenerate", total=4, unit="prompts", stream=stream) as bar:
        for number in range(4):
            bar.update(1, tokens=10 * number, loss=1.23456)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4, "one an update, and none twice"
    assert re.fullmatch(r"regenerate: 1/4 prompts \(25%\)  \S+ prompts/s  \S+ left  tokens 0  loss 1\.235", lines[0])
    assert "4/4 prompts (100%)" in lines[-1]


def test_lines_come_every_few_seconds_and_once_at_the_end() -> None:
    stream = io.StringIO()
    with Progress("train", total=1000, unit="steps", stream=stream) as bar:
        for _ in range(1000):
            bar.update()
    assert len(stream.getvalue().splitlines()) == 1


def test_a_line_comes_also_while_nothing_finishes_and_the_caller_may_know_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    stream = io.StringIO()
    with Progress("regenerate", total=10, unit="answers", stream=stream) as bar:
        bar.update(0, **{"tokens/s": 0.0, "in flight": 8})
        bar.update(0, 185.0, **{"tokens/s": 12.34, "in flight": 8})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "regenerate: 0/10 answers (0%)  0 answers/s  tokens/s 0  in flight 8"
    assert lines[1] == "regenerate: 0/10 answers (0%)  0 answers/s  3m05s left  tokens/s 12.34  in flight 8"


def test_work_of_an_earlier_call_does_not_flatter_the_rate() -> None:
    with Progress("x", total=2_000_000, initial=1_000_000, shown=False) as bar:
        bar.update(1)
        assert bar.done == 1_000_001
        assert bar.rate < 1_000_000


def test_other_ranks_say_nothing() -> None:
    stream = io.StringIO()
    with Progress("x", total=2, shown=False, stream=stream) as bar:
        bar.update(2)
    assert stream.getvalue() == ""


def shown_on(terminal: int) -> bytes:
    """All that was written to a terminal; closes it. One read may get a part: the kernel passes on in its own time."""
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while block := os.read(terminal, 65536):
            shown += block
    os.close(terminal)
    return shown


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    code = (
        "from dllm.progress import Progress\nwith Progress('train', total=3, unit='steps') as p: p.update(3, loss=0.5)"
    )
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = shown_on(ours)
    assert b"\x1b" in shown and b"3/3 steps" in shown and b"loss 0.5" in shown


def test_progress_of_another_process_is_drawn_over_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        lines = Lines(stream)
        for line in ("train: 1/3 steps", "train: 2/3 steps"):
            lines.show(line, is_progress=True)
        lines.show("saved", is_progress=False)
        lines.show("train: 3/3 steps", is_progress=True)
        lines.end()
        lines.end()
    assert shown_on(ours).decode() == "train: 1/3 steps\r\x1b[2Ktrain: 2/3 steps\r\nsaved\r\ntrain: 3/3 steps\r\n"


def test_work_that_an_earlier_call_has_done_has_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("evaluate", 13, "responses", initial=13):
        pass
    assert capsys.readouterr().err == "evaluate: 13/13 responses (100%)  from earlier work\n"


def test_progress_of_another_process_has_lines_of_its_own_elsewhere() -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    lines.show("train: 1/3 steps", is_progress=True)
    lines.show("saved", is_progress=False)
    lines.end()
    assert stream.getvalue() == "train: 1/3 steps\nsaved\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (-1, "0s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert clock(seconds) == text
