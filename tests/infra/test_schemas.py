"""Every file of infra/ against its schema, and each checker against a file that is broken: `make test-infra`."""

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.arch.source_tree import ROOT

pytestmark = pytest.mark.infra

INFRA = ROOT / "infra"
BIN = Path(os.environ.get("DLLM_INFRA_BIN", ROOT / ".venv-infra" / "bin"))
"""The programs and schemas, in an environment of their own: `make test-infra` makes it."""
SCRIPTS = sorted([*INFRA.rglob("*.sh"), *INFRA.rglob("*.sbatch")])
MANIFESTS = sorted((INFRA / "kubernetes").glob("*.yaml"))


def _run(*argv: str, text: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / argv[0]), *argv[1:]]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **variables}
    return subprocess.run(command, input=text, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def _documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def complaint_about(document: dict[str, Any], home: Path) -> str:
    """Return what is wrong with a document; empty where nothing is."""
    others = "compose" if "services" in document else "skypilot"
    kind = "jobset" if document.get("kind") == "JobSet" else "kubernetes" if "kind" in document else others
    checker = str(Path(__file__).with_name("schemas.py"))
    done = _run("python", checker, kind, text=json.dumps(document), HOME=str(home))  # importing sky writes there
    return done.stderr.strip() if done.returncode else ""


def test_compose_follows_the_specification(tmp_path: Path) -> None:
    document = yaml.safe_load((INFRA / "compose.yaml").read_text())
    assert not (complaint := complaint_about(document, tmp_path)), complaint
    document["services"]["s3"]["healthchek"] = document["services"]["s3"].pop("healthcheck")
    assert "healthchek" in complaint_about(document, tmp_path)


def test_the_images_steps_pass_hadolint() -> None:
    path = INFRA / "images" / "Dockerfile"
    done = _run("hadolint", str(path))
    assert done.returncode == 0, done.stdout
    broken = path.read_text().replace("python:3.11.13-slim-bookworm AS runtime", "python AS runtime")
    assert _run("hadolint", "-", text=broken).returncode != 0


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_passes_shellcheck(path: Path) -> None:
    done = _run("shellcheck", str(path))
    assert done.returncode == 0, done.stdout


def test_shellcheck_refuses_a_broken_script() -> None:
    assert _run("shellcheck", "-", text="#!/bin/sh\necho $x\n").returncode != 0


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_every_manifest_follows_its_schema(path: Path, tmp_path: Path) -> None:
    for document in _documents(path):
        assert not (complaint := complaint_about(document, tmp_path)), complaint


def test_broken_manifests_are_refused(tmp_path: Path) -> None:
    documents = {document["kind"]: document for path in MANIFESTS for document in _documents(path)}
    broken = copy.deepcopy(documents["StatefulSet"])
    broken["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    assert "readynessProbe" in complaint_about(broken, tmp_path)
    broken = copy.deepcopy(documents["JobSet"])
    broken["spec"]["failurPolicy"] = broken["spec"].pop("failurePolicy")
    assert "failurPolicy" in complaint_about(broken, tmp_path)


def test_the_skypilot_task_follows_its_schema(tmp_path: Path) -> None:
    task = yaml.safe_load((INFRA / "skypilot.yaml").read_text())
    assert not (complaint := complaint_about(task, tmp_path)), complaint
    assert "runn" in complaint_about(task | {"runn": "x"}, tmp_path)
