"""`--show` on a real terminal, and off one."""

import io
import os
import pty
import re

import pytest

from dllm.decoding import replay
from dllm.decoding.replay import BLANK, END, Replay
from dllm.models.diffusion.protocol import DiffusionLM
from tests.models.small_models import small_model

WIDTH, HEIGHT = 40, 10


@pytest.fixture(scope="module")
def model() -> DiffusionLM:
    return small_model()


def ids(model: DiffusionLM, text: str) -> list[int]:
    return list(model.tokenizer(text)["input_ids"])


@pytest.fixture
def shown(model, monkeypatch):
    """Write steps onto a canvas in a terminal; return what the terminal was sent."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("LINES", str(HEIGHT))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(replay, "FRAME", 0.0)

    def show(canvas, steps) -> tuple[str, Replay]:
        master, slave = pty.openpty()
        sent = b""
        with os.fdopen(slave, "w") as stream, Replay(model, canvas, stream) as view:
            os.set_blocking(master, False)
            for step in steps:
                view.watch(0, step)
                sent += os.read(master, 1 << 16)
        os.close(master)
        return sent.decode(), view

    return show


def test_a_terminal_shows_the_newest_tokens_within_its_height_and_is_wiped(model, shown) -> None:
    word = ids(model, "Zebra")
    far = 900
    steps = [[(0, ids(model, "A")[0])], [(far + n, token) for n, token in enumerate(word)]]
    sent, view = shown([None] * 1000, steps)
    assert view.live is not None and view.live.transient
    frames = [frame for frame in re.split(r"(?=step \d+:)", sent) if frame.startswith("step")]
    assert "1 new, 999 to go" in frames[0] and f"{len(word)} new, {999 - len(word)} to go" in frames[1]
    assert BLANK * WIDTH in frames[0]
    assert "Zebra" in frames[1] and "Zebra" not in frames[0]
    assert all(frame.count("\n") < HEIGHT for frame in frames)
    assert "\x1b[2K" in sent, "the second picture goes over the first"
    assert view.seconds > 0


def test_nothing_that_is_written_steers_the_terminal(model, shown) -> None:
    escape = ids(model, "\x1b[31mred")
    sent, _ = shown([None] * len(escape), [list(enumerate(escape))])
    assert "·[31mred" in sent and "\x1b[31mred" not in sent


def test_elsewhere_each_step_is_a_line(model) -> None:
    stream, end = io.StringIO(), min(model.eos_ids)
    with Replay(model, [None] * 4, stream) as view:
        view.watch(0, [(2, end)])
        view.watch(0, [(0, ids(model, "A")[0]), (9, 3)])  # 9 lies beyond what is asked for
    assert stream.getvalue() == f"[1] '{BLANK}{BLANK}{END}{BLANK}'\n[2] 'A{BLANK}{END}{BLANK}'\n"
