"""`dllm`, the script that pip installs: the same command line, and its completion in shells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import LONGEST_S

SCRIPT = Path(sys.executable).with_name("dllm")


def _call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=LONGEST_S, check=False
    )


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("dllm ev", ["evaluate"]), ("dllm recipe sh", ["show"]), ("dllm train --dry", ["--dry-run"])],
)
def test_a_shell_completes_verbs_and_options(typed: str, offered: list[str]) -> None:
    words = len(typed.split()) - 1
    done = _call(_DLLM_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(words))
    assert done.stdout.split() == offered
    assert not done.stderr


def test_help_and_hints_name_the_script() -> None:
    assert "Usage: dllm " in _call("--help").stdout
    done = _call("trian")
    assert done.returncode == 2
    assert "'train'" in done.stderr
    assert done.stderr.endswith("; see `dllm --help`\n")


def test_completion_is_offered_by_the_script_alone() -> None:
    assert "--install-completion" in _call("--help").stdout
    done = subprocess.run([sys.executable, "-m", "dllm", "--help"], capture_output=True, text=True, check=False)
    assert "Usage: python -m dllm " in done.stdout
    assert "--install-completion" not in done.stdout


def test_the_script_prepares_the_process_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\n"
        "atexit.register(lambda: print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('GLIBC_TUNABLES')))\n"
    )
    done = _call("train", "--help", PYTHONPATH=str(tmp_path), GLIBC_TUNABLES="")
    assert done.stdout.splitlines()[-1] == f"{os.environ.get('GOMP_SPINCOUNT', '10000')} glibc.malloc.hugetlb=1"
