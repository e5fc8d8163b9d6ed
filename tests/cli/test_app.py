"""The command line: each bad input gives one line, its exit code and no traceback."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dllm import __main__ as command
from dllm import errors
from dllm.config import recipe_book
from dllm.stages import STAGES
from tests.arch.source_tree import ROOT
from tests.patience import LONGEST_S


@pytest.fixture(autouse=True)
def _process_settings_come_back() -> Iterator[None]:
    hook, handlers = sys.excepthook, {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    sys.excepthook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a folder that holds the tiny recipe and nothing else."""
    recipe_book.activate("tiny-dflash", tmp_path / "params.yaml")
    return tmp_path


def _call(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        command.main(arguments)
    out, err = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err


BAD = [
    (["trian"], 2, "did you mean 'train'"),
    (["train", "--parms", "x"], 2, "no such option: --parms"),
    (["recipe", "shw"], 2, "did you mean 'show'"),
    (["recipe", "show", "tiny-dflsh"], 2, "did you mean tiny-dflash?"),
    (["generate", "--prompt", "hi"], 2, "--checkpoint"),
    (["generate", "--checkpoint", "x", "--prompt", "hi", "--sampler", "beam"], 2, "'dflash', 'ar'"),
    (["generate", "--checkpoint", "x"], 3, "no prompt"),
    (["generate", "--checkpoint", "x", "--prompt", "hi", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
    (["generate", "--checkpoint", "x", "--prompt", "hi", "--max-new-tokens", "999999999"], 2, "--max-new-tokens"),
    (["generate", "--checkpoint", "x", "--prompt", "hi", "--seed", "-1"], 2, "--seed"),
    (["generate", "--checkpoint", "x", "--prompt", "hi", "--seed", str(2**64)], 2, "--seed"),
    (["generate", "--checkpoint", "x", "--prompt", "hi", "--temperature", "-1"], 2, "--temperature"),
    (["generate", "--checkpoint", "x", "--prompt", "hi", "--top-k", "-1"], 2, "--top-k"),
    (["generate", "--checkpoint", "x", "--prompt", "hi", "--top-p", "1.5"], 2, "--top-p"),
    (["lm-eval", "--checkpoint", "x"], 2, "--tasks"),
    (["lm-eval", "--checkpoint", "x", "--tasks", "t", "--include-path", "absent"], 2, "no such folder of task files"),
    (["prepare", "--params", "absent.yaml"], 2, "no params file"),
    (["evaluate", "--checkpoint", "out/train"], 2, "--checkpoint and --to need each other (--to)"),
    (["evaluate", "--to", "x"], 2, "--checkpoint and --to need each other (--checkpoint)"),
    (["prepare", "--set", "train.epochs"], 2, "KEY=VALUE"),
    (["train", "--set", "train.dflash.block_size=1"], 2, "block of 1 has nothing to predict"),
    (["train", "--set", "train.dflash.blok_size=8"], 2, "did you mean block_size?"),
    (["report"], 5, "no stage has run"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), BAD, ids=[" ".join(arguments) for arguments, _, _ in BAD])
def test_bad_input_is_one_line(
    arguments: list[str], code: int, said: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    takes_root = arguments[0] in {*STAGES, "report"}
    got, _, err = _call(*arguments, *(["--root", str(project)] if takes_root else []), capsys=capsys)
    assert got == code
    assert said.lower() in err.lower()
    assert err.count("\n") == 1
    assert err.startswith("dllm: ")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.ConfigError("wrong", where="a.b", hint="do"), 2, "wrong (a.b); do"),
        (errors.DataError("wrong"), 3, "wrong"),
        (errors.ServerError("wrong"), 4, "wrong"),
        (errors.StageError("two\nlines"), 5, "two lines"),
        (errors.ModelError("wrong"), 6, "wrong"),
        (
            OSError(28, "No space left on device", "/x/shard"),
            5,
            "the disk is full (/x/shard); free some space and run the same command again",
        ),
        (
            OSError(98, "Address already in use"),
            5,
            "the port is taken; stop the process that holds it or choose another",
        ),
        (
            OSError(27, "File too large", "/x/shard"),
            5,
            "the file is larger than this process may write (ulimit -f) (/x/shard); raise that limit and run the same "
            "command again",
        ),
        (
            PermissionError(13, "Permission denied", "/x"),
            5,
            "Permission denied (/x); check owner and mode of it and of the folder it is in, and that the disk is not "
            "mounted read-only",
        ),
        (
            IsADirectoryError(21, "Is a directory", "/x"),
            5,
            "Is a directory (/x); a folder stands in place of a file: remove it or move it away, or name another path",
        ),
        (
            OSError(5, "Input/output error"),
            5,
            "Input/output error; the disk or its connection fails: see the system's log",
        ),
        (
            OSError(95, "Operation not supported"),
            5,
            "Operation not supported; --debug shows the code that asked for it",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_each_kind_of_failure_has_its_exit_code(
    error: BaseException,
    code: int,
    said: str,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(recipe_book, "summaries", fail)
    got, _, err = _call("recipe", "list", capsys=capsys)
    assert got == code
    assert err == (f"dllm: {said}\n" if said else "")


def _start(*arguments: str, code: str = "", **environment: str) -> subprocess.Popen[str]:
    start = [sys.executable, "-c", code] if code else [sys.executable, "-m", "dllm"]
    return subprocess.Popen(
        [*start, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


BUG = """
import sys
from dllm.config import recipe_book
from dllm import __main__
recipe_book.summaries = lambda: {}["bug"]
__main__.main(sys.argv[1:])
"""


def test_a_bug_of_ours_is_one_line_that_names_its_place() -> None:
    child = _start("recipe", "list", code=BUG)
    _, err = child.communicate(timeout=LONGEST_S)
    assert child.returncode == 1
    assert err.count("\n") == 1
    assert "unexpected KeyError: 'bug' (dllm/cli/recipes.py:" in err and "--debug" in err


def test_debug_shows_the_traceback(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _call("report", "--root", str(project), "--debug", capsys=capsys)
    assert code == 5
    assert "Traceback (most recent call last)" in err and "no stage has run" in err


def test_ranks_above_zero_say_who_speaks(project: Path) -> None:
    child = _start("train", "--root", str(project), "--set", "train.epoch=1", RANK="3")
    _, err = child.communicate(timeout=LONGEST_S)
    assert child.returncode == 2
    assert err.startswith("dllm rank 3: train.epoch: unknown key")


ENDED_BY = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]

SLEEP = """
import sys
from dllm.config import recipe_book
from dllm.process import signals
from dllm import __main__
def sleep():
    try:
        print("asleep", flush=True)
        signals.sleep(60)
    finally:
        print("cleaned", flush=True)
recipe_book.summaries = sleep
__main__.main(sys.argv[1:])
"""


@pytest.mark.parametrize(("sent", "code"), ENDED_BY)
def test_a_signal_ends_it_cleanly_with_its_code(sent: signal.Signals, code: int) -> None:
    child = _start("recipe", "list", code=SLEEP)
    assert child.stdout is not None
    assert child.stdout.readline() == "asleep\n"
    child.send_signal(sent)
    out, err = child.communicate(timeout=LONGEST_S)
    assert (child.returncode, out) == (code, "cleaned\n")
    assert "Traceback" not in err


FULL = """
import os, sys
from dllm.config import recipe_book
from dllm import __main__
def fill():
    import torch
    if os.environ["WHERE"] == "gpu":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of ...")
    torch.empty(1 << 50) if os.environ["WHERE"] == "torch" else bytearray(1 << 60)
recipe_book.summaries = fill
__main__.main(sys.argv[1:])
"""


@pytest.mark.parametrize("where", ["gpu", "torch", "python"])
def test_full_memory_is_one_line_that_says_what_helps(where: str) -> None:
    child = _start("recipe", "list", code=FULL, WHERE=where)
    _, err = child.communicate(timeout=LONGEST_S)
    assert child.returncode == 5
    assert err.startswith("dllm: memory is full; make batches or rows smaller") and err.count("\n") == 1


HALF_MADE = """
import asyncio, contextlib, os, sys, time
from dllm.config import recipe_book
from dllm.process.signals import handled
from dllm import __main__
class Struck(asyncio.SelectorEventLoop):
    def _make_self_pipe(self):
        os.kill(os.getpid(), int(os.environ["SENT"]))
        time.sleep(60)
def make():
    with handled() if os.environ["HELD"] else contextlib.nullcontext():
        Struck()
recipe_book.summaries = make
__main__.main(sys.argv[1:])
"""


@pytest.mark.parametrize("held", ["", "held"])
@pytest.mark.parametrize(("sent", "code"), ENDED_BY)
def test_a_signal_amid_the_making_of_an_event_loop_says_nothing(sent: signal.Signals, code: int, held: str) -> None:
    child = _start("recipe", "list", code=HALF_MADE, SENT=str(int(sent)), HELD=held)
    assert (child.communicate(timeout=LONGEST_S), child.returncode) == (("", ""), code)


def test_a_reader_that_leaves_is_no_error() -> None:
    child = _start("recipe", "show", "qwen3-8b-dflash")
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == ""
    child.wait(timeout=LONGEST_S)


def test_help_imports_nothing_slow() -> None:
    shown = "print(*sys.modules, file=sys.stderr)"
    code = f"import sys\nfrom dllm.__main__ import main\ntry: main(['--help'])\nfinally: {shown}"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    slow = {"torch", "transformers", "mlflow", "prefect", "dvc", "pyarrow", "numpy", "pandas", "matplotlib", "datasets"}
    assert "dllm.cli.app" in done.stderr.split() and not slow & set(done.stderr.split())


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _call("--help", capsys=capsys)
    assert code == 0
    assert all(verb in out for verb in [*STAGES, "generate", "recipe", "report"])


def test_recipes_are_listed_shown_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _call("recipe", "list", capsys=capsys)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == recipe_book.names()
    code, out, _ = _call("recipe", "show", "tiny-dflash", capsys=capsys)
    assert code == 0 and out == recipe_book.text("tiny-dflash")
    code, out, _ = _call("recipe", "use", "tiny-dflash", "--root", str(tmp_path), capsys=capsys)
    assert code == 0 and (tmp_path / "params.yaml").read_text() == recipe_book.text("tiny-dflash")
    (tmp_path / "params.yaml").write_text("recipe: mine\n")
    code, _, err = _call("recipe", "use", "tiny-dflash", "--root", str(tmp_path), capsys=capsys)
    assert code == 2 and "values are those of no recipe" in err and err.count("\n") == 1
