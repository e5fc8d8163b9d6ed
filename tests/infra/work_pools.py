"""Render a base job template, from stdin, as the worker of its type does: `python work_pools.py docker|kubernetes`.

Prints, as JSON, the template that this type's worker ships, and what it would start by ours. Run with the folder of
`make test-infra` that has prefect-docker and prefect-kubernetes on the path.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, cast
from uuid import uuid4

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun

NO_SERVER = cast(PrefectClient, object())
"""Asked only for blocks that a template refers to; ours refers to none."""


def of_docker(template: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the worker's own template, and what Docker's API is sent."""
    from docker import DockerClient
    from docker.models.containers import _create_container_args
    from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration

    configuration = _configure(DockerWorkerJobConfiguration, template)
    client = DockerClient(base_url="tcp://127.0.0.1:9", version="1.44")  # nothing connects
    settings = DockerWorker(work_pool_name="x")._build_container_settings(client, configuration)
    return DockerWorker.get_default_base_job_template(), _create_container_args({**settings, "version": "1.44"})


def of_kubernetes(template: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the worker's own template, and the Job."""
    from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

    configuration = _configure(KubernetesWorkerJobConfiguration, template)
    return KubernetesWorker.get_default_base_job_template(), configuration.job_manifest


def _configure(kind: Any, template: dict[str, Any]) -> Any:
    configuration = asyncio.run(kind.from_template_and_values(template, {}, client=NO_SERVER))
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="tiny-dflash: seed 3"))
    return configuration


if __name__ == "__main__":
    base, started = {"docker": of_docker, "kubernetes": of_kubernetes}[sys.argv[1]](json.load(sys.stdin))
    json.dump({"base": base, "started": started}, sys.stdout, default=str)
