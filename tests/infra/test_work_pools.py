"""The base job templates of infra/ against those of Prefect's own workers, and what these would start."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.arch.source_tree import ROOT
from tests.infra.test_schemas import BIN, complaint_about

pytestmark = pytest.mark.infra

WORKERS = BIN.parent / "workers"
"""prefect-docker, prefect-kubernetes and their clients; `make test-infra` makes it."""
OWN = {
    "docker": {"shm_size", "device_requests"},
    "kubernetes": {
        *("gpus", "shm_size", "grace_period_seconds", "project_claim", "models_claim"),
        *("node_selector", "tolerations", "priority_class_name", "image_pull_secrets", "active_deadline_seconds"),
    },
}
"""Variables that Prefect's template does not have."""
LEFT_OUT: dict[str, set[str]] = {"docker": {"privileged", "container_create_kwargs"}, "kubernetes": set()}
"""Variables of Prefect's template that ours does not have: no stage needs privileges, and ours fills in the other."""
KINDS = sorted(OWN)


def ours(kind: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / "infra" / kind / "work-pool.json").read_text()))


def render(kind: str, template: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    script = str(Path(__file__).with_name("work_pools.py"))
    environment = os.environ | {"PYTHONPATH": str(WORKERS), "PREFECT_API_URL": "http://prefect.example:4200/api"}
    argv = [sys.executable, script, kind]
    return subprocess.run(argv, input=json.dumps(template), env=environment, capture_output=True, text=True)


@functools.cache
def rendered(kind: str) -> dict[str, Any]:
    done = render(kind, ours(kind))
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("kind", KINDS)
def test_every_variable_and_field_is_one_of_prefects_own_template(kind: str) -> None:
    base, template = rendered(kind)["base"], ours(kind)
    variables = template["variables"]["properties"].keys()
    theirs = base["variables"]["properties"].keys()
    assert (variables - theirs, theirs - variables) == (OWN[kind], LEFT_OUT[kind])
    fields, their_fields = template["job_configuration"].keys(), base["job_configuration"].keys()
    assert fields <= their_fields <= fields | LEFT_OUT[kind]
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == variables, "each is used, and none is missing"


def test_dockers_client_takes_what_the_worker_makes_of_ours() -> None:
    started = rendered("docker")["started"]
    assert started["image"] == "dllm:cpu" and started["environment"]["DLLM_HOME"] == "/project"
    host = started["host_config"]
    assert host["ShmSize"] == 8 << 30 and host["Init"] is True
    assert [bind.split(":")[1] for bind in host["Binds"]] == ["/project"]
    broken = ours("docker")
    broken["job_configuration"]["container_create_kwargs"]["stop_timeout"] = 40
    assert "stop_timeout" in render("docker", broken).stderr, "such a pool starts nothing"


def test_gpus_are_asked_of_docker() -> None:
    template = ours("docker")
    template["variables"]["properties"]["device_requests"]["default"] = [{"count": -1, "capabilities": [["gpu"]]}]
    done = render("docker", template)
    (asked,) = json.loads(done.stdout)["started"]["host_config"]["DeviceRequests"]
    assert (asked["Count"], asked["Capabilities"]) == (-1, [["gpu"]])


def test_kubernetes_takes_the_job_that_the_worker_makes_of_ours(tmp_path: Path) -> None:
    job = rendered("kubernetes")["started"]
    assert not (complaint := complaint_about(job, tmp_path)), complaint
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"name": "DLLM_HOME", "value": "/project"} in container["env"]
    pod = job["spec"]["template"]
    assert pod["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu", "nodes with GPUs have this taint"
    assert pod["metadata"]["annotations"] == {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    assert job["spec"]["backoffLimit"] == 0, "Prefect schedules anew what was evicted"
    assert not {"nodeSelector", "priorityClassName", "imagePullSecrets"} & pod["spec"].keys(), "not asked for"
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    assert "terminationGracePeriod" in complaint_about(job, tmp_path)
