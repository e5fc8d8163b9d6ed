"""What is deployed: parameters that the flow takes, a pull step that finds the project, templates of pools."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.utilities.schema_tools.validation import validate

from flows.pipeline import pipeline
from tests.flows.conftest import ROOT

DEPLOYED = yaml.safe_load((ROOT / "prefect.yaml").read_text())
OF_PIPELINE = [each for each in DEPLOYED["deployments"] if each["entrypoint"].endswith(":pipeline")]
TEMPLATES = sorted(ROOT.glob("infra/*/work-pool.json"))


@pytest.mark.parametrize("deployment", OF_PIPELINE, ids=lambda each: each["name"])
def test_the_flow_takes_what_is_deployed(deployment: dict[str, Any]) -> None:
    validate(deployment["parameters"], pipeline.parameters.model_dump(), raise_on_error=True)
    assert set(deployment["parameters"]) <= set(pipeline.parameters.model_dump()["properties"])
    in_place = "checkout" not in deployment["parameters"]
    assert deployment["work_pool"]["name"] == ("local" if in_place else "checkouts")


def test_a_worker_finds_the_project_or_says_so(tmp_path: Path) -> None:
    step = DEPLOYED["pull"][0]["prefect.deployments.steps.run_shell_script"]
    outcomes = []
    for home in (str(ROOT), str(tmp_path), None):
        environment = {key: value for key, value in os.environ.items() if key != "DLLM_HOME"}
        environment |= {} if home is None else {"DLLM_HOME": home}
        outcomes.append(
            subprocess.run(["sh", "-c", step["script"]], env=environment, capture_output=True, text=True, check=False)
        )
    assert (outcomes[0].returncode, outcomes[0].stdout.strip()) == (0, str(ROOT))
    for outcome, named in zip(outcomes[1:], (tmp_path, "not set"), strict=True):
        assert outcome.returncode == 5 and outcome.stdout == ""
        assert re.fullmatch(rf"dllm: no project in DLLM_HOME \({named}\) on \S+; start .*\n", outcome.stderr)


def test_runs_that_only_wait_or_ask_servers_hold_no_gpu_of_a_cluster() -> None:
    """The variables that they set are those of the template, which a typo would leave at one GPU."""
    (path,) = [each for each in TEMPLATES if each.parent.name == "kubernetes"]
    variables = json.loads(path.read_text())["variables"]
    for deployment in DEPLOYED["deployments"]:
        given = deployment["work_pool"]["job_variables"]
        assert set(given) <= set(variables["properties"])
        validate(given, {**variables, "required": []}, raise_on_error=True)
        assert ("gpus" in given) == (deployment not in OF_PIPELINE) and not given.get("gpus")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.parent.name)
def test_a_template_names_the_variables_that_it_has(path: Path) -> None:
    template = json.loads(path.read_text())
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])
    defaults = {
        name: each["default"] for name, each in template["variables"]["properties"].items() if "default" in each
    }
    validate(defaults, template["variables"], raise_on_error=True)
