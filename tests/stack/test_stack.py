"""`make test-stack`: the pipeline over the servers of infra/compose.yaml, killed once, resumed, compared in MLflow."""

import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.arch.source_tree import ROOT
from tests.flows.conftest import copy_project
from tests.patience import LONGEST_S
from tests.stack.conftest import Stack, program, wait_until

pytestmark = pytest.mark.stack

DONE = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
PIPELINE_S = 900.0


def _say(line: str) -> None:
    print(f"\n  {line}", end="", flush=True)


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[MlflowClient]:
    """A client of the stack's MLflow."""
    environment = stack.environment("worker")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patch.setenv(name, environment[name])
        yield MlflowClient(environment["MLFLOW_TRACKING_URI"], environment["MLFLOW_TRACKING_URI"])


def _prefect(stack: Stack, *arguments: str) -> str:
    argv = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    done = subprocess.run(
        argv, cwd=stack.project, env=stack.environment("worker"), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _start_pipeline(stack: Stack) -> str:
    deployments = yaml.safe_load((stack.project / "prefect.yaml").read_text())["deployments"]
    name = next(each["name"] for each in deployments if each["entrypoint"].endswith(":pipeline"))
    told = _prefect(stack, "deployment", "run", f"pipeline/{name}")
    return re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", told)[0]  # type: ignore[index]


def _state(stack: Stack, flow_run: str) -> str:
    told = json.loads(_prefect(stack, "flow-run", "inspect", flow_run, "--output", "json"))
    return str(told["state"]["type"])


def _trainings(client: MlflowClient) -> list[Run]:
    """List the runs that have logged a training loss, the oldest first."""
    ids = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(ids, order_by=["start_time ASC"], max_results=100)
    return [run for run in runs if "loss" in run.data.metrics]


def _losses(client: MlflowClient, run: Run) -> list[tuple[int, float]]:
    return sorted((each.step, each.value) for each in client.get_metric_history(run.info.run_id, "loss"))


def test_the_pipeline_is_killed_resumed_and_compared(stack: Stack, client: MlflowClient) -> None:
    begin = time.monotonic()
    params = yaml.safe_load((stack.project / "params.yaml").read_text())
    params["train"] |= {"epochs": 8, "log_every": 1}
    (stack.project / "params.yaml").write_text(yaml.safe_dump(params))

    first = _start_pipeline(stack)
    wait_until(lambda: stack.alive("worker") and _trainings(client), "training logs its loss", PIPELINE_S)
    stack.kill("worker")
    killed = _trainings(client)[0]
    _say(f"killed at step {_losses(client, killed)[-1][0]} after {time.monotonic() - begin:.0f} s")
    stack.start("worker")
    second = _start_pipeline(stack)
    state = wait_until(lambda: (found := _state(stack, second)) in DONE and found, "the pipeline ends", PIPELINE_S)
    assert state == "COMPLETED", (stack.folder / "worker.log").read_text()[-4000:]
    assert first != second
    _say(f"resumed and completed after {time.monotonic() - begin:.0f} s")

    # The same by hand, uninterrupted, in a folder of its own, tracked by the same server.
    other = stack.folder / "other"
    copy_project(other)
    (other / "params.yaml").write_text(yaml.safe_dump(params))
    for stage in ("prepare", "regenerate", "train"):
        argv = [sys.executable, "-m", "dllm", stage]
        done = subprocess.run(argv, cwd=other, env=stack.environment("worker"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    runs = {run.info.run_id: run for run in _trainings(client)}
    whole = json.loads((other / "out" / "train" / "run.json").read_text())["mlflow_run_id"]
    resumed = next(run for key, run in runs.items() if key != whole)
    assert _losses(client, resumed) == _losses(client, runs[whole]), "the resumed run took other steps"
    _say(f"{len(_losses(client, resumed))} steps of both runs agree; {time.monotonic() - begin:.0f} s")


def test_artifacts_and_the_champion_are_in_the_servers_stores(stack: Stack, client: MlflowClient) -> None:
    bucket = stack.folder / "data" / "mlflow"
    assert any(path.is_file() for path in bucket.rglob("*")), "no artifact has reached S3"
    (model,) = client.search_registered_models()
    assert "champion" in model.aliases


def _get(address: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=LONGEST_S) as response:
        return str(response.read().decode())


def test_prometheus_scrapes_what_the_dashboard_draws(stack: Stack, tmp_path: Path) -> None:
    exported = _get(f"http://127.0.0.1:{stack.ports['exporter']}/metrics")
    assert 'dllm_up{server="mlflow"} 1.0' in exported and 'dllm_up{server="prefect"} 1.0' in exported
    dashboard = json.loads((ROOT / "infra" / "grafana" / "dashboards" / "dllm.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    ours = [query for query in queries if "dllm_" in query]
    for metric in sorted(set(re.findall(r'metric="(\w+)"', " ".join(ours)))):
        assert f'metric="{metric}"' in exported, f"no run has {metric}"
    if program("prometheus") is None:
        pytest.skip("Prometheus is not installed (apt-get install prometheus); its exporter was read by this test")
    port = stack.ports["prometheus"]
    config = (ROOT / "infra" / "prometheus" / "prometheus.yml").read_text()
    for name, to in (("exporter:9400", stack.ports["exporter"]), ("localhost:9090", port)):
        config = config.replace(name, f"127.0.0.1:{to}")
    (tmp_path / "prometheus.yml").write_text(config.replace("scrape_interval: 15s", "scrape_interval: 1s"))
    (tmp_path / "alerts.yml").write_text((ROOT / "infra" / "prometheus" / "alerts.yml").read_text())
    argv = [
        str(program("prometheus")),
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
    ]
    stack.spawn("prometheus", [*argv, f"--web.listen-address=127.0.0.1:{port}"], stack.environment("exporter"))

    def ask(query: str) -> list[Any]:
        query = query.replace("$experiment", ".*").replace("$__rate_interval", "1m")
        answer = json.loads(_get(f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(query)}"))
        assert answer["status"] == "success", query
        return list(answer["data"]["result"])

    def scraped() -> bool:
        try:
            return stack.alive("prometheus") and bool(ask("dllm_up"))
        except OSError:
            return False

    wait_until(scraped, "Prometheus has scraped")
    assert [query for query in ours if not ask(query)] == []
    for query in queries:  # SGLang's have no values without a GPU, and must still be queries
        ask(query)
    rules = json.loads(_get(f"http://127.0.0.1:{port}/api/v1/rules"))["data"]["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}
