import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dllm.errors import StageError
from dllm.process import children as process
from tests.patience import LONGEST_S


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_lines_of_both_streams_come_as_written_and_the_code_is_the_childs(tmp_path: Path) -> None:
    lines: list[str] = []
    code = (
        r"import os; print('a', flush=True); os.write(2, b'1%\r2%\r\nb\xc3'); os.write(2, b'\xa9'); raise SystemExit(7)"
    )
    result = process.run(python(code), log=lines.append, log_file=tmp_path / "logs" / "x.log")
    assert result.code == 7
    assert lines == ["a", "1%", "2%", "bé"]
    assert result.tail == tuple(lines)
    assert (tmp_path / "logs" / "x.log").read_text().splitlines() == lines


def test_a_line_is_handed_on_while_the_child_still_runs(tmp_path: Path) -> None:
    flag = tmp_path / "seen"
    # It ends once it sees what its line has led to.
    wait = f"while not pathlib.Path({str(flag)!r}).exists(): time.sleep(0.02)"
    code = f"import time, pathlib; print('now', flush=True)\n{wait}"
    assert process.run(python(code), log=lambda _: flag.touch(), deadline_s=LONGEST_S).code == 0


def test_more_output_than_a_pipe_holds_arrives_whole() -> None:
    lines: list[str] = []
    process.run(python("for i in range(50_000): print(i)"), log=lines.append)
    assert lines == [str(i) for i in range(50_000)]


def test_death_by_signal_reads_128_plus_its_number() -> None:
    assert process.run(python("import os; os.kill(os.getpid(), 9)")).code == 137


def test_environment_is_added_to() -> None:
    code = "import os; print(os.environ['EXTRA'], 'HOME' in os.environ)"
    assert process.run(python(code), env={"EXTRA": "yes"}).tail == (f"yes {'HOME' in os.environ}",)


def test_unknown_program_is_one_line() -> None:
    with pytest.raises(StageError, match="no-such-program"):
        process.run(["no-such-program"])


def test_deadline_stops_the_child(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(StageError, match=r"deadline of 0\.5 s"):
        process.run(python("import time; time.sleep(7200)"), deadline_s=0.5)
    assert time.monotonic() - began < LONGEST_S


def test_a_background_child_runs_beside_its_caller_and_ends_with_the_block(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "x.log"
    code = "import os, time; print('up', os.getpid(), flush=True); time.sleep(60)"
    with process.background(python(code), log_file=log, grace_s=2) as child:
        end = time.monotonic() + LONGEST_S
        while not child.tail:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert not child.ended
        assert log.read_text().splitlines() == list(child.tail)
        pid = int(child.tail[0].split()[1])
        assert psutil.pid_exists(pid)
    assert child.ended and not psutil.pid_exists(pid)
    assert child.result().code == 143


def test_a_background_child_that_ends_by_itself_keeps_its_last_words() -> None:
    with process.background(python("print('a'); print('no end of line', end=''); raise SystemExit(3)")) as child:
        result = child.result()
    assert (result.code, result.tail) == (3, ("a", "no end of line"))


def test_a_background_child_stops_when_its_lines_cannot_be_kept() -> None:
    def full(line: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    code = "import itertools\nfor n in itertools.count(): print(n)"
    with process.background(python(code), log=full, grace_s=1) as child, pytest.raises(OSError, match="No space"):
        child.result()
    assert child.ended


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_whatever_leaves_the_block_stops_the_background_child(error: type[BaseException]) -> None:
    with pytest.raises(error), process.background(python("import time; time.sleep(60)"), grace_s=2) as child:
        raise error
    assert child.ended


class Suspended(BaseException):
    """As Prefect's signals are."""


@pytest.mark.parametrize("error", [Suspended, OSError])
def test_a_log_that_raises_at_every_line_is_left_only_after_the_child(
    tmp_path: Path, error: type[BaseException]
) -> None:
    code = f"""
import signal, time
def end(*_):
    print("saving", flush=True)
    time.sleep(1)
    print("saved", flush=True)
    open({str(tmp_path / "saved")!r}, "w").close()
    raise SystemExit
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        raise error

    with pytest.raises(error):
        process.run(python(code), log=log)
    assert (tmp_path / "saved").exists()
    assert lines == ["ready", "saving", "saved"]


def test_stop_children_spares_those_named() -> None:
    spared = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    bystanders = process.children()
    doomed = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        process.stop_children(spare=bystanders)
        assert not psutil.pid_exists(doomed.pid)
        assert spared.poll() is None
    finally:
        spared.kill()
        doomed.kill()
        spared.wait()
