"""The machine while a run works, processor, memory, disk, network and GPUs, as MLflow's `system/...` metrics.

MLflow's own monitor writes to the store directly, and ends when the store is away; here the samples go through the
run's journal, as all else does. Its variables hold: MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false turns it off,
MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL sets the seconds.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping

from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

PREFIX = "system/"
INTERVAL_S = 10.0
SWITCH = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"


class SystemMetrics:
    """Samples the machine in a thread, until stopped.

    Args:
        log: takes the metrics of a sample and its number.
        first: number of the first sample.
    """

    def __init__(self, log: Callable[[Mapping[str, float], int], None], first: int) -> None:
        self._log, self._next = log, first
        self._over = threading.Event()
        self._interval_s = float(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or INTERVAL_S)
        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # no driver, or nvidia-ml-py is not installed
            self._monitors.append(GPUMonitor())
        if os.environ.get(SWITCH, "").strip().lower() not in ("false", "0"):
            threading.Thread(target=self._run, name="system-metrics", daemon=True).start()

    def stop(self) -> None:
        """Take no further sample."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(self._interval_s):
            found: dict[str, float] = {}
            for monitor in self._monitors:
                with contextlib.suppress(Exception):  # a figure of the machine that cannot be read stops no stage
                    monitor.collect_metrics()
                    found |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            if found and not self._over.is_set():
                self._log({f"{PREFIX}{name}": float(value) for name, value in found.items()}, self._next)
                self._next += 1
