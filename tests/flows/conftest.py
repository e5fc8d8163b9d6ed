"""A copy of the project in a folder of its own, with the tiny recipe made tinier, and its tools' environment."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from dllm.config import recipe_book
from tests.patience import LONGEST_S

ROOT = Path(__file__).parents[2]
OF_DVC = (".dvc/config", ".dvc/page.html", ".dvc/plots", ".dvcignore", "dvc.yaml")
PARTS = ("dllm", "flows", "infra", "data", *OF_DVC, "prefect.yaml")


class Project:
    """A working copy that commands run in, as a person would run them."""

    def __init__(self, folder: Path, prefect_home: Path) -> None:
        self.folder = folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "DLLM_"))}
        kept |= {k: v for k, v in os.environ.items() if k == "DLLM_CACHE"}
        self.environment = kept | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DLLM_HOME": str(folder),
            "PREFECT_HOME": str(prefect_home),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
            "DO_NOT_TRACK": "1",
            "DVC_NO_ANALYTICS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; both streams come back as stdout."""
        return subprocess.run(
            argv,
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )

    def flow(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the flow as `make run` does."""
        return self.run(sys.executable, "-m", "flows.pipeline", *arguments)


@contextlib.contextmanager
def served(project: Project, port: int) -> Iterator[None]:
    """Run `make serve` for the project, and see to it that nothing of it is left."""
    log = project.folder / "serve.log"
    with log.open("w") as stream:
        serve = subprocess.Popen(
            [sys.executable, "infra/services.py", "serve"],
            cwd=project.folder,
            env=project.environment | {"PREFECT_PORT": str(port)},
            stdout=stream,
        )
    try:
        while "Ctrl-C" not in log.read_text():
            assert serve.poll() is None, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        tree = psutil.Process(serve.pid).children(recursive=True)
        serve.terminate()
        serve.wait(timeout=LONGEST_S)
    assert not [process for process in tree if process.is_running()], "servers outlive `make serve`"
    assert not (project.folder / "prefect.toml").exists()


def wait_until(true: Callable[[], object], seconds: float) -> None:
    """Wait until something holds, and fail when it takes too long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"still not after {seconds} s"
        time.sleep(0.3)


def copy_project(folder: Path) -> None:
    """Copy what git tracks of the project and matters here."""
    for part in PARTS:
        source, goal = ROOT / part, folder / part
        goal.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, goal, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, goal)
    params = yaml.safe_load(recipe_book.text("tiny-dflash"))
    params["prepare"]["sources"][0]["limit"] = 24
    params["regenerate"]["max_new_tokens"] = 8
    params["train"]["epochs"] = 1
    params["evaluate"] |= {"num_prompts": 1, "max_new_tokens": 8, "identity_prompts": 1}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all: making its tables takes long."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def free_port() -> int:
    """Find a port that nobody holds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
