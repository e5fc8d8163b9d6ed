"""Serve the pipeline's figures to Prometheus: metrics of the newest MLflow runs, registered versions, flow runs.

`python infra/exporter.py --port 9400` reads the same variables as the stages: MLFLOW_TRACKING_URI, PREFECT_API_URL,
PREFECT_API_AUTH_STRING. Each scrape asks the servers. One that does not respond is `dllm_up` 0, without figures.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from servers import request

from dllm import secrets
from dllm.errors import DllmError
from dllm.process.proxies import bypass_for_loopback
from dllm.tracking.address import tracking_uri
from dllm.tracking.store import FAULTS, connect

STATES = ("SCHEDULED", "PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "CRASHED", "PAUSED", "CANCELLING")
RUNS = 200
"""Runs of an experiment that are looked at, the newest first."""


class Figures(Collector):
    """The figures, read at each scrape.

    Args:
        uri: of the MLflow store.
        api: of Prefect, with `/api`; None where there is none.
        password: `user:password` of Prefect, or None.
    """

    def __init__(self, uri: str, api: str | None, password: str | None) -> None:
        self._uri, self._api, self._password = uri, api, password

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the families of one scrape."""
        up = GaugeMetricFamily("dllm_up", "Whether a server responded.", labels=["server"])
        for server, read in (("mlflow", self._mlflow), ("prefect", self._prefect)):
            if server == "prefect" and self._api is None:
                continue
            try:
                yield from read()
                up.add_metric([server], 1)
            except (DllmError, OSError, *FAULTS) as error:
                print(f"{server}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
                up.add_metric([server], 0)
        yield up

    def describe(self) -> list[GaugeMetricFamily]:
        """Name no family beforehand: registering asks no server."""
        return []

    def _mlflow(self) -> list[GaugeMetricFamily]:
        labels = ["experiment", "run"]
        metric = GaugeMetricFamily(
            "dllm_metric", "Last value of a metric in the newest run of this name.", labels=[*labels, "metric"]
        )
        started = GaugeMetricFamily("dllm_run_start_time_seconds", "When that run started.", labels=labels)
        seconds = GaugeMetricFamily("dllm_run_duration_seconds", "How long that run took.", labels=labels)
        runs = GaugeMetricFamily("dllm_runs", "Runs by status.", labels=["experiment", "status"])
        version = GaugeMetricFamily("dllm_model_version", "Version that an alias names.", labels=["model", "alias"])
        client = connect(self._uri)
        for experiment in client.search_experiments():
            found = client.search_runs([experiment.experiment_id], max_results=RUNS, order_by=["start_time DESC"])
            counts: dict[str, int] = {}
            seen: set[str] = set()
            for run in found:
                counts[run.info.status] = counts.get(run.info.status, 0) + 1
                name = run.info.run_name
                if name in seen:
                    continue
                seen.add(name)
                started.add_metric([experiment.name, name], run.info.start_time / 1000)
                if run.info.end_time:
                    seconds.add_metric([experiment.name, name], (run.info.end_time - run.info.start_time) / 1000)
                for key, value in run.data.metrics.items():
                    metric.add_metric([experiment.name, name, key], value)
            for status, count in counts.items():
                runs.add_metric([experiment.name, status], count)
        for model in client.search_registered_models():
            for alias, number in model.aliases.items():
                version.add_metric([model.name, alias], float(number))
        return [metric, started, seconds, runs, version]

    def _prefect(self) -> list[GaugeMetricFamily]:
        flows = GaugeMetricFamily("dllm_flow_runs", "Prefect's flow runs by state.", labels=["state"])
        for state in STATES:
            chosen = {"flow_runs": {"state": {"type": {"any_": [state]}}}}
            flows.add_metric([state.lower()], request(f"{self._api}/flow_runs/count", self._password, chosen))
        return [flows]


def main(arguments: list[str]) -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bind", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=9400, help="0 takes a free one")
    given = parser.parse_args(arguments)
    bypass_for_loopback()
    registry = CollectorRegistry()
    uri = tracking_uri(Path(__file__).resolve().parents[1])
    registry.register(Figures(uri, os.environ.get("PREFECT_API_URL"), os.environ.get("PREFECT_API_AUTH_STRING")))
    server, _ = start_http_server(given.port, given.bind, registry)
    print(f"listening at http://{given.bind}:{server.server_port}", flush=True)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    secrets.install()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    try:
        main(sys.argv[1:])
    except DllmError as error:
        sys.exit(f"dllm: {error}")
