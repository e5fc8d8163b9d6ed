"""What a shell, a hook, a locale or another user's settings leave in the environment changes nothing, or is named."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dllm.__main__ as command
from dllm.config.params import Target
from dllm.digests import read_sealed
from dllm.models import hub, targets
from dllm.models.checkpoints import run_record
from dllm.process.git_hooks import VARIABLES
from dllm.process.interpreter import explain_import
from dllm.process.output import open_closed
from dllm.regeneration.store import ShardStore
from dllm.responses.shards import read_manifest, read_shard
from dllm.tracking.provenance import git_state
from dllm.training.checkpoints import STATE, read_state
from tests.patience import LONGEST_S

ROOT = Path(__file__).parents[2]


def call(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash, in which $DLLM is the command line, in a folder."""
    variables = {**os.environ, "DLLM": f"{sys.executable} -m dllm", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=variables, capture_output=True, timeout=LONGEST_S)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("$DLLM recipe use tiny-dflash >&-", 0),
        ("$DLLM recipe use tiny-dflash <&- >&- 2>&-", 0),
        ("$DLLM recipe use nosuch 2>&-", 2),
        ("$DLLM recipe use nosuch 2>/dev/full", 2),
        ("$DLLM recipe list >/dev/full", 5),
    ],
)
def test_streams_may_be_closed_or_full(tmp_path: Path, line: str, code: int) -> None:
    done = call(line, tmp_path)
    assert done.returncode == code, done
    assert (tmp_path / "params.yaml").exists() == (code == 0)
    assert done.stdout == b"" and done.stderr.count(b"\n") == (code == 5), done.stderr
    assert code != 5 or b"is full (standard output); " in done.stderr, "and not the project's disk"


def test_a_file_never_takes_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """A database opened as number 1 would get what a child prints."""
    line = (
        "import os, subprocess; from dllm.process.output import open_closed; open_closed(); "
        "file = open('data', 'wb'); subprocess.run(['echo', 'text']); print('more', flush=True); file.close()"
    )
    done = call(f'{sys.executable} -c "{line}" <&- >&-', tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data").read_bytes() == b""


def test_open_streams_stay_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    open_closed()
    os.write(1, b"text")
    assert capfd.readouterr().out == "text"


def test_a_file_of_the_folder_hides_no_module_of_python(tmp_path: Path) -> None:
    for name in ("random", "yaml", "typing", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')\n")
    done = call("$DLLM recipe list", tmp_path)
    assert done.returncode == 0 and b"tiny-dflash" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["torch/__init__.py", "torch.py"])
def test_a_module_that_pythonpath_puts_before_an_installed_one_is_named(tmp_path: Path, name: str) -> None:
    module = tmp_path / "others" / name
    module.parent.mkdir(parents=True)
    module.write_text("x = 1\n")
    assert call("$DLLM recipe use tiny-dflash", tmp_path).returncode == 0
    done = call("$DLLM train --dry-run", tmp_path, PYTHONPATH=f"{tmp_path}/others/:{ROOT}")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done
    assert f"dllm: {module} stands in place of the installed torch: ".encode() in done.stderr
    assert b"(PYTHONPATH); unset it, or rename that file" in done.stderr


def test_an_error_beside_a_pythonpath_that_hides_nothing_is_not_blamed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert explain_import(ImportError("x")) is None, "this project is installed from there"
    monkeypatch.setenv("PYTHONPATH", str(Path(pytest.__file__).parents[1]))
    assert explain_import(ImportError("x")) is None, "nothing else has these packages"
    assert explain_import(ValueError("x")) is None


@pytest.mark.parametrize("program", ["dllm --version", "flows.pipeline --help", "flows.unchanged"])
def test_a_python_without_the_packages_is_named(program: str) -> None:
    done = call(f"{sys.executable} -S -m {program}", Path("/"))  # -S: no installed packages
    assert (done.returncode, done.stderr.count(b"\n"), done.stdout) == (2, 1, b""), done
    name = "typer" if program.startswith("dllm") else "prefect"
    start = f"dllm: the package {name} is not installed ({sys.executable}); install it there, or enter"
    assert done.stderr.startswith(start.encode())


def test_a_module_of_ours_that_is_missing_is_a_bug() -> None:
    assert explain_import(ModuleNotFoundError("No module named 'dllm.x'", name="dllm.x")) is None


def test_links_in_a_circle_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("rows.jsonl")
    line = "$DLLM regenerate --input-data rows.jsonl --output-dir out --model builtin:tiny --dry-run"
    done = call(line, tmp_path)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done
    assert b"symbolic links that lead back to themselves" in done.stderr and b"rows.jsonl)" in done.stderr


@pytest.mark.parametrize("verb", ["recipe list", "train"])
def test_a_python_without_docstrings_is_refused(tmp_path: Path, verb: str) -> None:
    done = call(f"$DLLM {verb}", tmp_path, PYTHONOPTIMIZE="2")
    assert (done.returncode, done.stderr.count(b"\n"), done.stdout) == (2, 1, b""), done
    assert b"drops docstrings, which packages need (PYTHONOPTIMIZE); unset it" in done.stderr


@pytest.mark.parametrize("setting", ["error", "ignore"])
def test_what_other_packages_warn_of_is_no_failure(tmp_path: Path, setting: str) -> None:
    line = "$DLLM recipe use tiny-dflash && $DLLM prepare"
    done = call(line, tmp_path, PYTHONWARNINGS=setting, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert done.returncode == 0, done.stderr
    assert setting == "error" or b"Warning" not in done.stderr, "what the user has silenced stays silent"


def test_texts_are_utf8_in_every_locale(tmp_path: Path) -> None:
    """The name is one letter to whoever reads UTF-8, and two bytes to whoever reads ASCII."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = call("$DLLM prepare --params p\u00e4rams.yaml", tmp_path, **ascii_only)
    assert done.returncode == 2
    assert b"/p?rams.yaml" in done.stderr, "printed in the encoding of the locale"


def test_an_unknown_home_is_one_line(tmp_path: Path) -> None:
    done = call("$DLLM export --checkpoint x --to '~nosuchuser/x'", tmp_path)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr
    assert done.stderr.startswith(b"dllm: this user's home directory is not known (HOME); set HOME")


def test_a_hook_of_another_repository_names_no_commit_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    for words in (["init", "--quiet", "."], ["commit", "--quiet", "--allow-empty", "--message", "x"]):
        who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
        other.mkdir(exist_ok=True)
        subprocess.run(["git", *who, *words], cwd=other, check=True)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    for name in VARIABLES[1:]:
        monkeypatch.delenv(name, raising=False)  # and monkeypatch brings back what the call below removes
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "project").mkdir()
    assert git_state(tmp_path / "project")["reason"] != "outside", "as git sees it"
    with pytest.raises(SystemExit):
        command.main(["--version"])
    assert git_state(tmp_path / "project") == {"commit": None, "dirty": None, "reason": "outside"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_now_is_neither_damaged_nor_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    """A network disk that was away, or a limit of the shell, would cost hours of finished work."""
    shard = tmp_path / "shard-00000.json"
    sealed = tmp_path / "determining.json"
    state = tmp_path / "step-000001" / STATE
    state.parent.mkdir()
    run = tmp_path / "run.json"
    manifest = tmp_path / "manifest.json"
    for path in (shard, sealed, state, run, manifest):
        path.write_text("{}")
    entry: Any = {"file": shard.name, "sha256": "0"}

    def refuse(path: Path, *_: object) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        for read in (
            lambda: ShardStore(tmp_path),
            lambda: read_sealed(sealed),
            lambda: read_state(state.parent),
            lambda: run_record(tmp_path),
            lambda: read_manifest(tmp_path),
            lambda: list(read_shard(tmp_path, entry)),
        ):
            with pytest.raises(OSError, match=os.strerror(number)):
                read()
    assert shard.exists() and "damaged" not in capfd.readouterr().err
    ShardStore(tmp_path)
    assert not shard.exists(), "damaged, and to be made again"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_cache_of_hugging_face_that_cannot_be_written_is_no_missing_network(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/hf/hub")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(OSError, match="/hf/hub"):
        targets.locate(Target(model="someone/model"))
