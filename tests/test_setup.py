"""`make setup`: an environment that is another project's stays as it is."""

import shutil
import subprocess
from pathlib import Path

from tests.arch.source_tree import ROOT


def test_an_environment_that_is_linked_is_left_alone(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    (ours / "infra").mkdir(parents=True)
    shutil.copy(ROOT / "infra" / "setup.sh", ours / "infra")
    (ours / ".venv").symlink_to(theirs)
    done = subprocess.run(["bash", "infra/setup.sh"], cwd=ours, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert f".venv is a link to {theirs}" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(theirs.iterdir())
