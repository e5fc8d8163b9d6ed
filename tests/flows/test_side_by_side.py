"""Two recipes side by side through a real server and its workers, each in a checkout, beside the user's files."""

import json
import logging
import re
import sys
import threading
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from dllm.config import recipe_book
from dllm.tracking import mlflow_runs as tracking
from tests.flows.asking import TINIER, ask, end, git, serving, start, workers_said
from tests.flows.conftest import Project, wait_until
from tests.patience import LONGEST_S

pytestmark = [pytest.mark.outage, pytest.mark.flows]

PARENT = "mlflow.parentRunId"


@pytest.fixture(scope="module")
def told() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Serve a webhook; give its address and what it is told."""
    heard: list[dict[str, str]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Webhook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/token", heard
        server.shutdown()


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, prefect_home: Path, free_port: int, told: tuple[str, Any]
) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("project")
    with serving(folder, prefect_home, free_port, {"DLLM_ALERTS_URL": told[0]}) as project:
        yield project


def test_two_recipes_side_by_side_beside_the_users_files(project: Project) -> None:
    one = start(project, "tiny", seed=3, save_as="experiment")
    two = start(project, "tiny", recipe="tiny-dflash2", save_as="branch")
    trees = [project.folder / "work/checkouts" / run / "tree" for run in (one, two)]
    wait_until(lambda: all(tree.exists() for tree in trees), LONGEST_S)
    ended = [end(project, run) for run in (one, two)]
    for run, recipe in zip(ended, ("tiny-dflash", "tiny-dflash2"), strict=True):
        assert run["state"]["type"] == "COMPLETED", workers_said(project)
        assert run["state"]["message"].startswith("champion: the first version, τ 1.0")
        assert run["name"].startswith(f"{recipe}: prepare.sources=") and set(run["tags"]) == {"pipeline", "dflash"}
    assert ended[0]["name"].endswith("evaluate.identity_prompts=1, seed 3")
    assert not any(tree.parent.exists() for tree in trees)
    assert git(project, "status", "--porcelain") == "" and not (project.folder / "out").exists()
    experiment, branch = (re.search(r"(experiment|branch) (\S+)", run["state"]["message"])[2] for run in ended)
    assert yaml.safe_load(git(project, "show", f"{branch}:params.yaml"))["recipe"] == "tiny-dflash2"
    applied = project.run("dvc", "exp", "apply", experiment)
    assert applied.returncode == 0, applied.stdout
    assert (project.folder / "out/train/checkpoint/model.safetensors").exists(), "bytes are in the shared cache"
    assert yaml.safe_load((project.folder / "params.yaml").read_text())["train"]["seed"] == 3
    client = tracking.connect(f"sqlite:///{project.folder}/mlflow.db")
    assert {each.name for each in client.search_experiments()} >= {"tiny-dflash", "tiny-dflash2"}
    for name in ("tiny-dflash", "tiny-dflash2"):
        source = client.get_model_version_by_alias(name, "champion").source
        assert f"{project.folder}/registered/" in str(source), "not in the checkout, which is gone"


def test_twins_do_the_work_once_and_have_an_execution_each(project: Project) -> None:
    twins = [start(project, "tiny", seed=11) for _ in range(2)]
    for run in [end(project, run) for run in twins]:
        assert run["state"]["type"] == "COMPLETED", workers_said(project)
    logs = [(project.folder / "logs" / run / "train.log").read_text() for run in twins]
    assert sorted("steps (" in log for log in logs) == [False, True], logs
    client = tracking.connect(f"sqlite:///{project.folder}/mlflow.db")
    (experiment,) = [each for each in client.search_experiments() if each.name == "tiny-dflash"]
    executions = [run for run in client.search_runs([experiment.experiment_id]) if PARENT not in run.data.tags]
    assert [sum(run.data.tags["dllm.flow_run"] == twin for run in executions) for twin in twins] == [1, 1]
    said = [entry["message"] for entry in ask(project, "logs/filter", {"logs": {"level": {"ge_": logging.ERROR}}})]
    assert not [line for line in said if "works on this" in line or "failed to reproduce" in line]


def test_what_fails_says_so_and_is_reported(project: Project, told: tuple[str, list[dict[str, str]]]) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        start(project, "tiny", overrides={"train.epochz": 2})
    assert "'train.epochz' was unexpected" in refused.value.read().decode()
    run = end(project, start(project, "tiny", overrides={"train.epochs": "many"}))
    said = "train.epochs: Input should be a valid number, got 'many' (tiny-dflash.yaml)"
    assert (run["state"]["type"], run["state"]["message"]) == ("FAILED", said)
    wait_until(lambda: any(said in each["text"] for each in told[1]), LONGEST_S)


@pytest.mark.parametrize(
    ("deployment", "force"), [("tiny", False), ("tiny", True), ("project", True)], ids=["as-is", "forced", "in-place"]
)
def test_a_suspended_run_stops_its_stage_resumes_and_can_be_cancelled(
    project: Project, deployment: str, force: bool
) -> None:
    long = {**TINIER, "train.epochs": 100_000, "train.validate_every": 1_000_000}
    if deployment == "project":  # in the user's own file, which no flow run changes then
        params = recipe_book.load("tiny-dflash", [f"{key}={json.dumps(value)}" for key, value in long.items()])
        (project.folder / "params.yaml").write_text(recipe_book.text_of(params, []))
    run = start(project, deployment, overrides={} if deployment == "project" else long, force=force)
    log = project.folder / "logs" / (run if deployment == "tiny" else "") / "train.log"
    wait_until(lambda: log.exists() and "steps (" in log.read_text(), LONGEST_S)
    suspend = "import sys; from uuid import UUID; from prefect.flow_runs import suspend_flow_run as suspend; "
    done = project.run(sys.executable, "-c", f"{suspend} suspend(flow_run_id=UUID(sys.argv[1]), timeout=86400)", run)
    assert done.returncode == 0, done.stdout
    wait_until(lambda: "train: stopped; the next call resumes" in log.read_text(), LONGEST_S)
    wait_until(lambda: not (project.folder / "work/checkouts" / run).exists(), LONGEST_S)
    assert ask(project, f"flow_runs/{run}")["state"]["name"] == "Suspended"
    before = log.read_text()
    ask(project, f"flow_runs/{run}/resume", {})
    wait_until(lambda: "steps (" in log.read_text().removeprefix(before), LONGEST_S)
    after = log.read_text().removeprefix(before)
    steps = [[int(step) for step in re.findall(r"train: (\d+)/", text)] for text in (before, after)]
    assert 0 < steps[0][-1] <= steps[1][0], "it went on from the checkpoint that it saved when it was stopped"
    ask(project, f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    final = {"COMPLETED", "FAILED", "CANCELLED"}  # one that is cancelled crashes on the way
    wait_until(lambda: ask(project, f"flow_runs/{run}")["state"]["type"] in final, LONGEST_S)
    assert ask(project, f"flow_runs/{run}")["state"]["type"] == "CANCELLED", workers_said(project)


def test_a_deployment_anew_keeps_what_its_user_has_set(project: Project) -> None:
    known = {each["name"]: each for each in ask(project, "automations/filter", {})}
    assert len(known) == 7 and not known["dllm: train on new responses"]["enabled"]
    (dflash,) = (each for each in ask(project, "deployments/filter", {}) if each["name"] == "dflash")
    (nightly,) = ask(project, f"deployments/{dflash['id']}/schedules")
    assert not nightly["active"]
    for words in (
        ["automation", "pause", "dllm: report what fails"],
        ["deployment", "schedule", "resume", "pipeline/dflash", nightly["id"]],
    ):
        done = project.run("prefect", *words)
        assert done.returncode == 0, done.stdout
    done = project.run(sys.executable, "infra/deploy.py")
    assert done.returncode == 0, done.stdout
    again = {each["name"]: each for each in ask(project, "automations/filter", {})}
    assert {name: each["id"] for name, each in again.items()} == {name: each["id"] for name, each in known.items()}
    assert not again["dllm: report what fails"]["enabled"]
    assert [each["active"] for each in ask(project, f"deployments/{dflash['id']}/schedules")] == [True]
