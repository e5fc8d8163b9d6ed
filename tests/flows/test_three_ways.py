"""The real pipeline on the tiny model: as `make run`, as `dvc repro`, and as a deployment of a real server."""

import json
import os
import re
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dllm.stages import DVC_STAGES, STAGES
from dllm.tracking import mlflow_runs as tracking
from dllm.tracking import model_registry
from tests.flows.conftest import Project, copy_project, served, wait_until
from tests.patience import LONGEST_S

pytestmark = [pytest.mark.flows, pytest.mark.slow]

RANKS = """
import os, pathlib, sys
from dllm.config.load import load_params
from dllm.process import parent, signals
from dllm.stages import workspace as contract
from dllm.training import launch
parent.follow_parent()
if not launch.is_rank():
    sys.exit(launch.run(sys.orig_argv, 2))
root = pathlib.Path()
params = load_params("params.yaml", ["train.nproc=2"])
rank = int(os.environ["RANK"])
with contract.open_stage("train", params, sections=[params.train], root=root, is_main=rank == 0) as stage:
    print("train: under way", flush=True)
    (root / f"rank-{rank}.pid").write_text(f"{os.getpid()} {stage.tracker.run_id}")
    signals.sleep(600)
"""


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Have a database without the runs of other files, for all of it is looked at."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path) -> Project:
    folder = tmp_path_factory.mktemp("project")
    copy_project(folder)
    return Project(folder, prefect_home)


@pytest.fixture(scope="module")
def first(project: Project) -> str:
    """Run it all once, and return what was printed."""
    done = project.flow()
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def server(project: Project, first: str, free_port: int) -> Iterator[None]:
    with served(project, free_port):
        yield


def lock(project: Project) -> str:
    return (project.folder / "dvc.lock").read_text()


def runs(project: Project) -> list[tuple[str, str]]:
    client = tracking.connect(f"sqlite:///{project.folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny-dflash"]
    found = client.search_runs([experiment.experiment_id])
    return sorted((r.data.tags.get("dllm.stage", "pipeline"), r.info.status) for r in found)


def artifacts(prefect_home: Path) -> list[str]:
    with sqlite3.connect(prefect_home / "prefect.db") as database:
        return sorted(key for (key,) in database.execute("select distinct key from artifact where key is not null"))


def flow_runs(prefect_home: Path) -> list[tuple[str, str, str]]:
    """Give name, state and message of each flow run, the latest last."""
    with sqlite3.connect(prefect_home / "prefect.db") as database:
        query = "select r.name, s.type, s.message from flow_run r join flow_run_state s on s.id = r.state_id"
        return database.execute(f"{query} order by r.start_time").fetchall()


def score(project: Project) -> str:
    return f"τ {json.loads((project.folder / 'out/register/metrics.json').read_text())['tau_micro']:.3f}"


def test_the_first_run_leaves_everything(project: Project, first: str, prefect_home: Path) -> None:
    positions = [first.index(f"== {stage} ==") for stage in STAGES]
    assert positions == sorted(positions)
    assert re.search(r"regenerate: \d+/24 responses .* responses/s", first), "live progress reaches the terminal"
    assert "Traceback" not in first and "\x1b" not in first
    assert "git add" not in first
    assert runs(project) == sorted((stage, "FINISHED") for stage in (*STAGES, "pipeline"))
    bars = {f"{stage}-progress" for stage in ("regenerate", "train", "evaluate")}
    assert {"acceptance-curve", "evaluation", "summary"} | bars == set(artifacts(prefect_home))
    registered = json.loads((project.folder / "out/register/metrics.json").read_text())
    assert registered["aliases"] == ["challenger", "champion"]
    said = f"champion: the first version, {score(project)}"
    assert flow_runs(prefect_home) == [("tiny-dflash", "COMPLETED", said)]


def test_the_registered_version_tells_where_it_came_from(
    project: Project, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = tracking.connect(tracking.tracking_uri(project.folder))
    tags = client.get_model_version_by_alias("tiny-dflash", "champion").tags
    trained = json.loads((project.folder / "out/train/run.json").read_text())
    assert tags["dllm.data_digest"] == trained["inputs"]["regenerate"]
    assert len(tags["dllm.dvc_lock"]) == 64 and tags["dllm.git_commit"] == "None"
    kept = model_registry.resolve("models:/tiny-dflash@champion", project.folder)
    weights, trained_weights = (at / "model.safetensors" for at in (kept, project.folder / "out/train/checkpoint"))
    assert weights.read_bytes() == trained_weights.read_bytes()
    assert not weights.samefile(trained_weights), "what damages one leaves the other whole"


def test_dvc_repro_finds_nothing_to_do_and_keeps_the_lock(project: Project, first: str) -> None:
    before = lock(project)
    done = project.run("dvc", "repro")
    assert done.returncode == 0, done.stdout
    assert all(f"Stage '{stage}' didn't change, skipping" in done.stdout for stage in DVC_STAGES)
    assert lock(project) == before
    assert "tau_micro" in project.run("dvc", "metrics", "show", "--json").stdout


def test_make_run_finds_nothing_to_do_before_it_starts_a_flow(project: Project, first: str) -> None:
    asked = (sys.executable, "-m", "flows.unchanged")
    done = project.run(*asked)
    assert done.returncode == 0 and "up to date" in done.stdout, done.stdout
    with closing(sqlite3.connect(project.folder / "mlflow.db")) as database:
        database.execute("update registered_model_aliases set alias = 'gone' where alias = 'champion'")
        database.commit()
        assert project.run(*asked).returncode == 1, "the registry says otherwise"
        database.execute("update registered_model_aliases set alias = 'champion' where alias = 'gone'")
        database.commit()
    curve = project.folder / "out/evaluate/plots/acceptance.csv"
    before = curve.read_bytes()
    curve.write_bytes(before + b"4,1.0,edited\n")
    assert project.run(*asked).returncode == 1, "DVC says otherwise"
    curve.write_bytes(before)
    assert project.run(*asked).returncode == 0


def test_results_that_are_taken_as_they_are_are_those_of_params_yaml_or_said_not_to_be(
    project: Project, first: str, prefect_home: Path
) -> None:
    path = project.folder / "params.yaml"
    before = path.read_text()
    refused = project.flow("--from-stage", "evaluate", "--set", "train.epochs=7")
    assert refused.returncode == 2, refused.stdout
    assert "dllm: train.epochs changes the stage train, whose result is taken as it is (from_stage:" in refused.stdout
    assert path.read_text() == before
    path.write_text(before.replace("epochs: 1", "epochs: 7"))
    taken = project.flow("--from-stage", "register", "--no-register")
    path.write_text(before)
    assert taken.returncode == 0, taken.stdout
    with closing(sqlite3.connect(prefect_home / "prefect.db")) as database:
        said = [text for (text,) in database.execute("select message from log") if "taken as it is" in text]
    assert said == ["train: its result is taken as it is, although DVC finds changes: params.yaml (train)"]


def test_a_deployment_finds_nothing_to_do_and_keeps_the_lock(project: Project, server: None) -> None:
    before, made = lock(project), runs(project)
    done = project.run("prefect", "deployment", "run", "pipeline/project", "--watch")
    assert done.returncode == 0, done.stdout + (project.folder / "logs/prefect-worker-local.log").read_text()
    assert lock(project) == before
    assert runs(project) == made, "what is skipped makes no MLflow run"


def test_a_taken_port_is_one_line(project: Project, server: None, free_port: int, tmp_path: Path) -> None:
    port, home = str(free_port), str(tmp_path)  # the first server's own database is refused before its port
    done = project.run(sys.executable, "infra/services.py", "serve", PREFECT_PORT=port, PREFECT_HOME=home)
    assert done.returncode == 5
    assert len(done.stdout.splitlines()) == 1 and f"the port is taken (127.0.0.1:{free_port})" in done.stdout


def test_cancelling_a_flow_run_leaves_no_rank_and_no_open_run(project: Project, server: None) -> None:
    before = lock(project)
    (project.folder / "ranks.py").write_text(RANKS)
    pipeline = (project.folder / "dvc.yaml").read_text()
    (project.folder / "dvc.yaml").write_text(pipeline.replace("cmd: python -m dllm train", "cmd: python ranks.py"))
    said = project.run("prefect", "deployment", "run", "pipeline/project").stdout
    flow_run = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", said)
    assert flow_run, said
    pids = [project.folder / f"rank-{rank}.pid" for rank in (0, 1)]
    wait_until(lambda: all(path.exists() and path.read_text() for path in pids), LONGEST_S)
    ranks = [int(path.read_text().split()[0]) for path in pids]
    project.run("prefect", "flow-run", "cancel", flow_run[0])
    wait_until(lambda: "CANCELLED" in project.run("prefect", "flow-run", "inspect", flow_run[0]).stdout, LONGEST_S)
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, signal.SIG_DFL)
    assert ("train", "KILLED") in runs(project)
    assert not [status for _, status in runs(project) if status == "RUNNING"]
    (project.folder / "dvc.yaml").write_text(pipeline)
    after = project.run("dvc", "repro")
    assert after.returncode == 0, after.stdout
    assert "is cached - skipping run" in after.stdout and lock(project) == before
