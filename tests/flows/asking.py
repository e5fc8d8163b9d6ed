"""A project in git under `make serve`, and its server asked as its pages ask it."""

import contextlib
import json
import shutil
import subprocess
import time
import tomllib
import urllib.error
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from infra import servers
from tests.flows.conftest import ROOT, Project, copy_project, served, wait_until
from tests.patience import LONGEST_S

TINIER = {
    "prepare.sources": [{"name": "gsm8k", "limit": 24}],
    "regenerate.max_new_tokens": 8,
    "train.epochs": 1,
    "evaluate.num_prompts": 1,
    "evaluate.max_new_tokens": 8,
    "evaluate.identity_prompts": 1,
}
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@contextlib.contextmanager
def serving(folder: Path, prefect_home: Path, port: int, environment: Mapping[str, str]) -> Iterator[Project]:
    """Commit a copy of the project, and serve it."""
    copy_project(folder)
    shutil.copy(ROOT / ".dvc/.gitignore", folder / ".dvc")
    (folder / ".gitignore").write_text((ROOT / ".gitignore").read_text() + "/serve.log\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["add", "--all"], ["commit", "--quiet", "--message", "first"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    project = Project(folder, prefect_home)
    project.environment |= environment
    with served(project, port):
        yield project


def ask(project: Project, what: str, body: object = None) -> Any:
    """Ask Prefect's API; None as the body is a GET."""
    api = tomllib.loads((project.folder / "prefect.toml").read_text())["api"]
    end = time.monotonic() + LONGEST_S
    while True:
        try:
            return servers.request(f"{api['url']}/{what}", api["auth_string"], body)
        except urllib.error.HTTPError as error:  # its database is locked: clients of Prefect try again, too
            if error.code != 503 or time.monotonic() > end:
                raise
            time.sleep(0.5)


def start(project: Project, deployment: str, **parameters: object) -> str:
    """Start a deployment of `pipeline`, with the tinier recipe unless told otherwise; return the flow run's id."""
    return run_deployment(project, "pipeline", deployment, {"overrides": TINIER, **parameters})


def run_deployment(project: Project, flow: str, deployment: str, parameters: Mapping[str, object]) -> str:
    """Start a deployment, and return the flow run's id."""
    found = ask(project, f"deployments/name/{flow}/{deployment}")["id"]
    return str(ask(project, f"deployments/{found}/create_flow_run", {"parameters": dict(parameters)})["id"])


def end(project: Project, run: str) -> dict[str, Any]:
    """Wait for a flow run's final state."""
    wait_until(lambda: ask(project, f"flow_runs/{run}")["state"]["type"] in FINAL, LONGEST_S)
    return dict(ask(project, f"flow_runs/{run}"))


def workers_said(project: Project) -> str:
    """Return the logs of the workers."""
    return "".join(path.read_text() for path in sorted((project.folder / "logs").glob("prefect-worker-*.log")))


def git(project: Project, *arguments: str) -> str:
    """Run git in the project's folder."""
    done = subprocess.run(["git", *arguments], cwd=project.folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def states(project: Project, run: str) -> list[str]:
    """List the names of the states that a flow run has had."""
    return [each["name"] for each in ask(project, f"flow_run_states/?flow_run_id={run}")]


def shown(value: object) -> str:
    """Write what an assertion shows."""
    return json.dumps(value, indent=1, default=str)[:4000]
