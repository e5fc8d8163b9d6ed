"""Files and folders appear whole or not at all, whatever happens while they are written."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dllm import files as whole_file
from dllm.disk_faults import what_helps
from dllm.files import atomic_folder, atomic_link, atomic_write
from tests.patience import LONGEST_S

KILLED_IN_THE_MIDDLE = """
import sys, time
from pathlib import Path
from dllm.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as aside:
    (aside / "half").write_text("half")
    print("under way", flush=True)
    time.sleep(60)
"""


WRITERS = [lambda path: atomic_write(path, b"1"), lambda path: atomic_link(Path(__file__), path)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, *files: str) -> None:
    with atomic_folder(folder) as aside:
        for name in files:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_text(name)


def test_a_file_is_replaced_and_never_changed(tmp_path: Path) -> None:
    path, linked = tmp_path / "file", tmp_path / "linked"
    atomic_write(path, b"old")
    linked.hardlink_to(path)
    atomic_write(path, b"new")
    assert (path.read_bytes(), linked.read_bytes()) == (b"new", b"old")
    assert names(tmp_path) == ["file", "linked"]


@pytest.mark.parametrize("write", WRITERS, ids=["write", "link"])
def test_a_link_under_the_temporary_name_leads_nowhere(tmp_path: Path, write: Callable[[Path], None]) -> None:
    precious, path = tmp_path / "precious", tmp_path / "manifest.json"
    precious.write_text("years of work")
    for place in (tmp_path / "manifest.json.tmp", path):
        place.symlink_to(precious)
    write(path)
    assert precious.read_text() == "years of work" and not path.is_symlink() and path.read_bytes() != b"years of work"
    assert names(tmp_path) == ["manifest.json", "precious"]


@pytest.mark.parametrize("links", [True, False], ids=["link", "copy"])
def test_a_file_gets_a_second_place_as_often_as_asked(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, goal = tmp_path / "source", tmp_path / "goal"
    source.write_bytes(b"new")
    goal.write_bytes(b"old")
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EXDEV, "another disk")

        monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):
        atomic_link(source, goal)
        assert goal.read_bytes() == b"new" and goal.samefile(source) == links
        assert names(tmp_path) == ["goal", "source"]
    with pytest.raises(FileNotFoundError):
        atomic_link(tmp_path / "absent", goal)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_folder_is_replaced_by_exactly_the_new_files(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:  # a system without the call
        monkeypatch.setattr(whole_file, "_exchange", lambda one, other: False)
    goal = tmp_path / "deep" / "goal"
    fill(goal, "a", "b/c")
    fill(goal, "d")
    assert names(goal) == ["d"]
    assert names(goal.parent) == ["goal"]


def test_an_error_keeps_the_old_folder(tmp_path: Path) -> None:
    goal = tmp_path / "goal"
    fill(goal, "old")
    with pytest.raises(OSError, match="No space"), atomic_folder(goal) as aside:
        (aside / "new").write_text("new")
        raise OSError(28, "No space left on device")
    assert names(goal) == ["old"] and names(tmp_path) == ["goal"]


def test_a_kill_in_the_middle_leaves_nothing_that_lasts(tmp_path: Path) -> None:
    goal = tmp_path / "goal"
    child = subprocess.Popen([sys.executable, "-c", KILLED_IN_THE_MIDDLE, str(goal)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"under way\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not goal.exists() and len(names(tmp_path)) == 1
    fill(goal, "whole")
    assert names(tmp_path) == ["goal"]


def test_what_a_user_keeps_under_a_like_name_stays(tmp_path: Path) -> None:
    (tmp_path / ".goal.swp").write_text("an editor's")
    (tmp_path / ".goal.d").mkdir()
    (tmp_path / ".goal.0123456").mkdir()
    (tmp_path / ".goal.01234567.old").mkdir()
    kept = names(tmp_path)
    fill(tmp_path / "goal", "a")
    assert names(tmp_path) == [*kept, "goal"]


def test_two_that_publish_one_folder_at_once_both_end_and_the_last_one_stays(tmp_path: Path) -> None:
    goal = tmp_path / "goal"
    with atomic_folder(goal) as slow:
        (slow / "slow").write_text("slow")
        fill(goal, "quick")
        assert names(goal) == ["quick"] and (slow / "slow").exists()
    assert names(goal) == ["slow"] and names(tmp_path) == ["goal"]


PIPES = """
import os
from pathlib import Path
from dllm.files import refuse_pipes

os.mkfifo("pipe")
refuse_pipes()
for reading in (open, Path.read_bytes, Path.read_text, lambda p: os.open(p, os.O_RDONLY), lambda p: open(p, "a+b")):
    try:
        reading(Path("pipe"))
    except OSError as error:
        assert error.strerror == "a pipe stands in place of a file" and error.filename == "pipe", error
    else:
        raise AssertionError(reading)
os.close(os.open("pipe", os.O_RDONLY | os.O_NONBLOCK))
read_end, write_end = os.pipe()
os.write(write_end, b"of a shell")
os.close(write_end)
print(Path(f"/dev/fd/{read_end}").read_text(), end="")
"""


def test_no_named_pipe_is_waited_for(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", PIPES]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=LONGEST_S)
    assert done.stdout == "of a shell", done.stderr


def test_a_file_in_place_of_a_folder_says_what_helps(tmp_path: Path) -> None:
    (tmp_path / "tracking").write_text("")
    with pytest.raises(FileExistsError) as refusal:
        (tmp_path / "tracking").mkdir(exist_ok=True)
    assert "remove it or move it away" in what_helps(refusal.value)
