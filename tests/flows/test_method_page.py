"""The page on training methods, run as `make run` does: an outside method, from prompts to the registry."""

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.extending.pages import install
from tests.flows.conftest import Project, copy_project

pytestmark = [pytest.mark.flows, pytest.mark.slow]


def test_an_outside_method_goes_through_the_flow(tmp_path: Path, prefect_home: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    install("method", package)
    folder = tmp_path / "project"
    folder.mkdir()
    copy_project(folder)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["train"] |= {"mode": "few_anchors", "few_anchors": params["train"].pop("dflash")}
    params["train"]["few_anchors"]["num_blocks_per_sample"] = 3
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    project = Project(folder, prefect_home)
    project.environment["PYTHONPATH"] = f"{package}{os.pathsep}{folder}"
    done = project.flow()
    assert done.returncode == 0, done.stdout
    assert json.loads((folder / "out/train/metrics.json").read_text())["anchors_per_sequence"] == 3
    registered = json.loads((folder / "out/register/metrics.json").read_text())
    assert registered["version"] == 1 and registered["tau_micro"] >= 1
    report = project.run("python", "-m", "dllm", "report").stdout
    assert "anchors per sequence" in report and "τ micro" in report
