"""What a teammate does: clone, pull from the remote, run, and generate with the champion; nothing is made again."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dllm.stages import DVC_STAGES
from tests import s3_server
from tests.flows.conftest import ROOT, Project, copy_project

pytestmark = [pytest.mark.outage, pytest.mark.flows]
IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@example.org")


def done(project: Project, *argv: str) -> str:
    """Run a command that must succeed, and return what it printed."""
    environment = project.environment
    found = subprocess.run(argv, cwd=project.folder, env=environment, capture_output=True, text=True, timeout=3600)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("teammate") / "mine"
    folder.mkdir()
    copy_project(folder)
    for name in (".gitignore", ".dvc/.gitignore"):
        shutil.copyfile(ROOT / name, folder / name)
    project = Project(folder, folder.parent / "prefect")
    project.environment |= s3_server.KEYS
    done(project, sys.executable, "-m", "dvc", "repro")
    return project


@pytest.fixture
def s3() -> Iterator[str]:
    pytest.importorskip("dvc_s3")
    with s3_server.serving("team") as address:
        yield address


def test_an_experiment_in_a_copy_is_compared_with_the_commit(mine: Project) -> None:
    done(mine, "git", "add", "--all")
    done(mine, "git", *IDENTITY, "commit", "--quiet", "--message", "first")
    done(mine, "dvc", "exp", "run", "--temp", "--name", "longer", "--set-param", "train.epochs=2")
    changed = json.loads(done(mine, "dvc", "metrics", "diff", "HEAD", "longer", "--json"))
    steps = changed["out/train/headline.json"]["steps"]
    assert steps["new"] == 2 * steps["old"]
    done(mine, "dvc", "plots", "diff", "HEAD", "longer")
    page = (mine.folder / "dvc_plots" / "index.html").read_text()
    assert '"rev": "HEAD"' in page and '"rev": "longer"' in page
    same = json.loads(done(mine, sys.executable, "-m", "dllm", "data", "diff", "HEAD", "longer", "--json"))
    assert same["rows"]["changed"] == same["rows"]["added"] == 0 < same["rows"]["same"]


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_teammate_pulls_what_was_made_and_generates_with_it(
    mine: Project, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path / "remote") if kind == "folder" else "s3://team/dllm"
    done(mine, "dvc", "remote", "add", "--force", "--default", "team", url)
    if kind == "s3":
        done(mine, "dvc", "remote", "modify", "team", "endpointurl", request.getfixturevalue("s3"))
    done(mine, "git", "add", "--all")
    done(mine, "git", *IDENTITY, "commit", "--quiet", "--allow-empty", "--message", kind)
    assert "pushed" in done(mine, "dvc", "push")

    subprocess.run(["git", "clone", "--quiet", mine.folder, tmp_path / "yours"], check=True)
    yours = Project(tmp_path / "yours", mine.folder.parent / "prefect")
    yours.environment |= s3_server.KEYS
    done(yours, "dvc", "pull")
    assert "up to date" in done(yours, "dvc", "status")
    ran = done(yours, sys.executable, "-m", "flows.pipeline")
    for stage in DVC_STAGES:
        assert f"Stage '{stage}' didn't change, skipping" in ran
    assert "version 1 (new)" in ran
    champion = ("--checkpoint", "models:/tiny-dflash@champion", "--prompt", "2 + 2?", "--max-new-tokens", "4")
    assert done(yours, sys.executable, "-m", "dllm", "generate", *champion)
