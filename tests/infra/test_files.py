"""What the files of infra/ promise each other and the code: names, ports, passwords, grace periods, figures."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.arch.source_tree import ROOT

INFRA = ROOT / "infra"
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name for name, service in SERVICES.items() if service["image"].startswith("${DLLM_")}
ONCE = {"deploy"}
AS_ROOT = {"sglang", "dcgm"}
"""Images of others that have no other user, or that read counters of the driver."""
ENVIRONMENT = dict(
    line.split("=", 1) for line in (INFRA / "stack.env").read_text().splitlines() if line and line[0] != "#"
)


def _manifests() -> list[dict[str, Any]]:
    files = sorted((INFRA / "kubernetes").glob("*.yaml"))
    return [each for path in files for each in yaml.safe_load_all(path.read_text()) if each]


def _pods(node: Any) -> list[dict[str, Any]]:
    """Find pod specifications: mappings that have containers."""
    if isinstance(node, dict):
        found = [node] if "containers" in node else []
        return found + [pod for value in node.values() for pod in _pods(value)]
    return [pod for value in node for pod in _pods(value)] if isinstance(node, list) else []


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_listens_on_loopback_is_pinned_and_says_its_health(name: str) -> None:
    service = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "healthcheck" in service or name in OURS, "no health check"
    image = service["image"]
    assert image.startswith("${DLLM_") or re.search(r":v?\d+\.\d+\.\d+", image) or image.startswith("postgres:17.6")
    assert name in AS_ROOT or service.get("user") not in (None, "root", "0", "0:0"), "runs as root"
    assert service["restart"] == ("no" if name in ONCE else "unless-stopped")


def test_secrets_are_files_that_exist_after_the_script_and_nowhere_else(tmp_path: Path) -> None:
    script = tmp_path / "secrets.sh"
    script.write_text((INFRA / "secrets.sh").read_text())
    subprocess.run(["bash", str(script)], check=True, capture_output=True, env=os.environ | {"HF_TOKEN": "hf_x"})
    before = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "secrets").iterdir()} == {0o600}
    subprocess.run(["bash", str(script)], check=True, capture_output=True)
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == before
    assert before["api_auth"] == f"dllm:{before['mlflow_password']}"
    assert set(COMPOSE["secrets"]) == set(before)
    for name, service in SERVICES.items():
        named = set(re.findall(r"/run/secrets/(\w+)", json.dumps(service)))
        assert named <= set(service.get("secrets", [])), f"{name} reads a secret that it is not given"
    assert not re.search(r"(?i)(password|secret|token|key): *[\"']?[\w-]{8,}", (INFRA / "stack.env").read_text())


def test_every_secret_file_variable_is_read_by_the_entrypoint(tmp_path: Path) -> None:
    known = set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", (INFRA / "images" / "entrypoint.sh").read_text()))
    for name in OURS:
        for variable in SERVICES[name].get("environment", {}):
            assert not variable.endswith("_FILE") or variable.removesuffix("_FILE") in known, variable
    secret = tmp_path / "token"
    secret.write_text('it\'s "x"\n')
    entrypoint = str(INFRA / "images" / "entrypoint.sh")
    done = subprocess.run(
        ["bash", entrypoint, "env"], env={**os.environ, "HF_TOKEN_FILE": str(secret)}, capture_output=True, text=True
    )
    assert 'HF_TOKEN=it\'s "x"\n' in done.stdout and "HF_TOKEN_FILE" not in done.stdout


def test_variables_of_compose_stand_in_the_one_environment_with_the_same_defaults() -> None:
    text = (INFRA / "compose.yaml").read_text()
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    machine = {"DLLM_UID", "DLLM_GID"}
    assert set(used) - machine <= set(ENVIRONMENT)
    differ = {name for name, value in used.items() if name not in machine and ENVIRONMENT[name] != value}
    assert differ <= {"DLLM_TARGET_URL"}, differ  # the worker with GPUs has SGLang beside it


def test_the_grace_period_is_the_same_everywhere() -> None:
    grace = ENVIRONMENT["GRACE_S"]
    assert COMPOSE["x-worker"]["stop_grace_period"] == f"${{GRACE_S:-{grace}}}s"
    pods = [pod for pod in _pods(_manifests()) if pod["containers"][0]["name"] not in ("router", "clone")]
    assert {pod["terminationGracePeriodSeconds"] for pod in pods} == {int(grace)}
    pool = json.loads((INFRA / "kubernetes" / "work-pool.json").read_text())
    assert pool["variables"]["properties"]["grace_period_seconds"]["default"] == int(grace)
    for path in (INFRA / "slurm").glob("*.sbatch"):
        if "run_on_nodes" in path.read_text():
            assert f"#SBATCH --signal=B:TERM@{grace}" in path.read_text(), path.name


def test_pods_name_volumes_secrets_and_limits_that_exist() -> None:
    manifests = _manifests()
    claims = {each["metadata"]["name"] for each in manifests if each["kind"] == "PersistentVolumeClaim"}
    secrets = {each["metadata"]["name"]: each for each in manifests if each["kind"] == "Secret"}
    for pod in _pods(manifests):
        volumes = {each["name"]: each for each in pod.get("volumes", [])}
        named = {each["persistentVolumeClaim"]["claimName"] for each in volumes.values() if "emptyDir" not in each}
        assert named <= claims
        for container in pod["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes.keys()
            for source in container.get("envFrom", []):
                assert source.get("secretRef", {"name": "dllm"})["name"] in secrets
                assert source.get("configMapRef", {"name": "dllm-env"})["name"] == "dllm-env"
            if "nvidia.com/gpu" in container["resources"].get("limits", {}):
                assert volumes["shm"]["emptyDir"]["medium"] == "Memory", "ranks and SGLang share memory"


@pytest.mark.parametrize("script", sorted((INFRA / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_the_folder_of_a_jobs_log_is_there_in_a_fresh_clone(script: Path) -> None:
    """Slurm makes none, and ends a job without a word where it is missing."""
    (output,) = re.findall(r"^#SBATCH --output=(\S+)", script.read_text(), re.MULTILINE)
    kept = (Path(output).parent / ".gitignore").as_posix()
    ignored = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", kept], cwd=ROOT, check=False)
    assert (ROOT / kept).is_file() and ignored.returncode == 1
    cleaned = re.search(r"^clean:.*\n\t@rm -rf (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert cleaned and Path(output).parts[0] not in cleaned[1].split(), "`make clean` leaves the folder"


def test_a_rented_node_runs_every_stage_and_can_log_in() -> None:
    task = yaml.safe_load((INFRA / "skypilot.yaml").read_text())
    assert task["run"].splitlines()[-2:] == ["dvc repro", "exec python -m dllm register"]
    places = [path for path in INFRA.rglob("*") if path.is_file() and path.suffix in (".yaml", ".sh", ".env")]
    texts = {path: path.read_text() for path in places if path.name != "entrypoint.sh"}
    assert not [path for path, text in texts.items() if "MLFLOW_TRACKING_PASSWORD" in text and "_USERNAME" not in text]


def test_the_rendezvous_address_is_the_first_pod_of_the_jobset() -> None:
    (jobset,) = [each for each in _manifests() if each["kind"] == "JobSet"]
    (job,) = jobset["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    first = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['spec']['network']['subdomain']}:29500"
    assert f"--rdzv-endpoint={first}" in container["command"]
    assert f"--nnodes={job['template']['spec']['completions']}" in container["command"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in container["command"]


def test_the_work_pool_keeps_what_prefects_worker_fills_in() -> None:
    import prefect

    (file,) = Path(prefect.__file__).parent.rglob("aggregate-worker-metadata.json")
    base = json.loads(file.read_text())["prefect-kubernetes"]["kubernetes"]["default_base_job_configuration"]
    ours = json.loads((INFRA / "kubernetes" / "work-pool.json").read_text())
    assert base["job_configuration"].keys() <= ours["job_configuration"].keys()
    assert base["variables"]["properties"].keys() <= ours["variables"]["properties"].keys()
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(ours["job_configuration"])))
    assert used <= ours["variables"]["properties"].keys()
    assert {"gpus", "shm_size", "grace_period_seconds", "project_claim", "models_claim"} <= used


def test_ranges_of_the_dashboard_do_not_overlap_and_every_query_names_a_figure() -> None:
    dashboard = json.loads((INFRA / "grafana" / "dashboards" / "dllm.json").read_text())
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not mine & cells and place["x"] + place["w"] <= 24, panel["title"]
        cells |= mine
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    exporter = (INFRA / "exporter.py").read_text()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            for name in re.findall(r"\bdllm_\w+", target["expr"]):
                assert f'"{name}"' in exporter, f"{panel['title']}: {name}"
            assert target["datasource"]["uid"] == "prometheus"


def test_every_work_pool_has_a_worker_in_each_profile() -> None:
    pools = {each["work_pool"]["name"] for each in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    for profile in ("cpu", "gpu"):
        services = [each for each in SERVICES.values() if profile in each.get("profiles", [])]
        commands = [each.get("command", []) for each in services]
        assert {command[-1] for command in commands if "worker" in command} == pools


def test_prometheus_scrapes_services_that_exist() -> None:
    scrapes = yaml.safe_load((INFRA / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for each in scrapes for config in each["static_configs"] for target in config["targets"]]
    assert {target.split(":")[0] for target in targets} - {"localhost"} <= SERVICES.keys()
    assert {"exporter:9400", "dcgm:9400"} <= set(targets)


def test_sglang_and_the_workers_have_gpus_of_their_own() -> None:
    given = {
        name: service["deploy"]["resources"]["reservations"]["devices"][0].get("device_ids")
        for name, service in SERVICES.items()
        if "deploy" in service
    }
    assert given.pop("dcgm") is None
    assert given == {
        "sglang": ["${SGLANG_GPUS:-0}"],
        "worker-gpu": ["${WORKER_GPUS:-1}"],
        "worker-checkouts-gpu": ["${WORKER_GPUS:-1}"],
    }
    assert ENVIRONMENT["SGLANG_GPUS"] != ENVIRONMENT["WORKER_GPUS"]
