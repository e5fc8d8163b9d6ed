"""What all tests share: the examples Hypothesis draws, the report's header, and MLflow stores."""

import fcntl
import os
import platform
import shutil
import signal
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples in every run, so that a change is judged by what it changed; `make test-laws` draws others.
# None is judged by its time, nor by that of drawing it: a loaded machine may take seconds for either.
PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("same", derandomize=True, **PATIENT)
settings.register_profile("other", derandomize=False, print_blob=True, **PATIENT)
settings.load_profile("same")

# Under nohup SIGHUP is ignored, in the background of a script SIGINT, and children would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Give every test, and the fixtures of the next module, as many threads: torch's order of a sum depends on them."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


HEADER = ("torch", "transformers", "mlflow", "prefect", "dvc")


def pytest_report_header() -> list[str]:
    """Name what figures and speeds depend on: versions, and the processor with its vector units."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    units = torch.backends.cpu.get_cpu_capability()
    has_amx = "amx_tile" in _cpu("flags").split()
    return [
        "versions: " + ", ".join(f"{name} {version(name)}" for name in HEADER),
        f"cpu: {_cpu('model name') or platform.processor() or platform.machine()}, {cores} cores, "
        f"{units}{' with AMX' if has_amx else ''}",
    ]


def _cpu(name: str) -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


@pytest.fixture(scope="session")
def empty_mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with MLflow's tables, made once for all workers: it takes seconds."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    store = shared / "empty-mlflow.db"
    with (shared / "empty-mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not store.exists():
            from dllm.tracking.mlflow_runs import connect

            unfinished = store.with_suffix(".unfinished")
            connect(f"sqlite:///{unfinished}").search_experiments()
            unfinished.rename(store)
    return store


@pytest.fixture(scope="module")
def mlflow_store(empty_mlflow_store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a real MLflow store of the module's own."""
    return f"sqlite:///{shutil.copyfile(empty_mlflow_store, tmp_path_factory.mktemp('mlflow') / 'mlflow.db')}"
