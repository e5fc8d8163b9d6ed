"""Which stages hold a GPU: those that compute on this machine, whatever DVC or servers have already."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from dllm.config import recipe_book
from dllm.registry import ENGINES
from flows import computes, gpu_slots, regenerate_parts
from flows.children import Place
from flows.gpu_slots import slot_of_stage
from tests.flows.conftest import Project

STAGE = "import pathlib; pathlib.Path('out').write_text(pathlib.Path('data').read_text())"
COMPUTING = {"local": True, "sglang": True, "openai": False, "dataset": False}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Make a project of DVC with one stage, which has run for two states of its input."""
    project = Project(tmp_path, tmp_path)
    (tmp_path / "stage.py").write_text(STAGE)
    stage = {"cmd": "python stage.py", "deps": ["data"], "outs": ["out"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"train": stage}}))
    assert project.run("dvc", "init", "--quiet", "--no-scm").returncode == 0
    for content in ("old", "new"):
        (tmp_path / "data").write_text(content)
        done = project.run("dvc", "repro")
        assert done.returncode == 0, done.stdout
    monkeypatch.chdir(tmp_path)
    return project


def test_a_stage_computes_where_dvc_has_no_results_of_its_inputs(project: Project) -> None:
    data, out, lock = (project.folder / name for name in ("data", "out", "dvc.lock"))
    assert computes.main(["train"]) == computes.NO, "up to date"
    assert computes.main(["train", "--force"]) == 0
    out.unlink()
    before = lock.read_bytes()
    assert computes.main(["train"]) == computes.NO, "its results are in the cache, as in a new checkout"
    data.write_text("old")
    assert computes.main(["train"]) == computes.NO, "those of an earlier run are restored"
    data.write_text("never seen")
    assert computes.main(["train"]) == 0
    assert not out.exists() and lock.read_bytes() == before, "looking changes nothing"


def test_a_stage_without_work_waits_for_no_slot(project: Project, tmp_path: Path, monkeypatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: a stand-in (UUID: GPU-aa11)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{project.environment['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(computes.__file__).parents[1]))
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # nobody gives a slot there
    with slot_of_stage(Place(tmp_path, tmp_path), "train", force=False):
        pass


def test_a_look_that_takes_too_long_holds_the_slots(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_slots, "LOOK_DEADLINE_S", 0.0)
    monkeypatch.setattr(gpu_slots, "gpu_slot", lambda is_needed: nullcontext(is_needed()))
    with slot_of_stage(Place(project.folder, project.folder), "train", force=False) as held:
        assert held


@pytest.mark.parametrize("name", list(ENGINES))
def test_an_engine_that_generates_nothing_here_needs_no_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = recipe_book.load("tiny-dflash", [f"regenerate.engine={name}"])
    recipe_book.write(tmp_path / "params.yaml", recipe_book.text_of(params, []))
    monkeypatch.chdir(tmp_path)
    assert computes.engine_computes(name) == COMPUTING[name]
    assert (computes.main(["regenerate", "--force"]) != computes.NO) == COMPUTING[name]


@pytest.mark.parametrize(
    ("options", "engine"),
    [
        ("--model builtin:tiny", "local"),
        ("--model x --target-server http://h:1/v1 --temperature 0", "openai"),
        ("--engine=dataset --model x", "dataset"),
        ("--temperature 0 --engine", "local"),
    ],
)
def test_the_engine_of_a_part_is_that_of_its_options(options: str, engine: str) -> None:
    assert regenerate_parts._engine(options) == engine
