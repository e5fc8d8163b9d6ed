"""Check one document, from stdin as JSON, against a schema: `python schemas.py compose|kubernetes|jobset|skypilot`.

Run with the interpreter of .venv-infra, which has the schemas. Prints what is wrong, and then exits with 1.
"""

from __future__ import annotations

import copy
import json
import sys
from importlib.metadata import files
from pathlib import Path
from typing import Any

KUBERNETES = "1.34"


def compose(document: dict[str, Any]) -> None:
    """Check a compose file."""
    import jsonschema

    (file,) = (each.locate() for each in files("check-jsonschema") or () if each.name == "compose-spec.json")
    jsonschema.validate(document, json.loads(Path(str(file)).read_text()))


def kubernetes(document: dict[str, Any]) -> None:
    """Check an object of Kubernetes itself; unknown keys are refused."""
    import kubernetes_validate

    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def jobset(document: dict[str, Any]) -> None:
    """Check a JobSet: its own keys, and each Job in it."""
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    own = copy.deepcopy(document)
    for each in own["spec"]["replicatedJobs"]:
        kubernetes({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **each["template"]})
        each["template"] = {"spec": {"template": {}}}
    read = JobsetV1alpha2JobSet.from_dict(own)
    if read is None or read.to_dict() != own:  # reading drops keys that it does not know
        raise ValueError(f"unknown keys: of {own}, {read and read.to_dict()} was read")


def skypilot(document: dict[str, Any]) -> None:
    """Check a task of SkyPilot."""
    import jsonschema
    from sky.utils import schemas

    jsonschema.validate(document, schemas.get_task_schema())
    jsonschema.validate(document["resources"], schemas.get_resources_schema())
    for mount in document["file_mounts"].values():
        jsonschema.validate(mount, schemas.get_storage_schema())


if __name__ == "__main__":
    check = {"compose": compose, "kubernetes": kubernetes, "jobset": jobset, "skypilot": skypilot}[sys.argv[1]]
    try:
        check(json.load(sys.stdin))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}"[:2000])
