"""SGLang's life from outside: believed only once it has written a token, taken down whole, its death explained."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from dllm.config.load import parse_params
from dllm.config.params import Params, Target
from dllm.engines import sglang
from dllm.errors import ConfigError, ServerError, StageError
from dllm.models import targets
from tests.engines.fake_sglang import make_environment
from tests.patience import LONGEST_S


def params(python: Path | str | None, **settings: Any) -> Params:
    own = {"python": None if python is None else str(python), "start_timeout_s": 60.0, **settings}
    return parse_params(
        {
            "recipe": "test",
            "target": {"model": "builtin:tiny"},
            "prepare": {"sources": [{"name": "mine.jsonl"}]},
            "regenerate": {"engine": "sglang", "sglang": own},
            "register": {"model_name": "test"},
        }
    )


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sglang, "GRACE_S", 2.0)
    return make_environment(tmp_path / "environment")


def tree() -> list[psutil.Process]:
    """List the processes under this one, zombies aside."""
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


def ask(url: str) -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "this"}], "max_tokens": 5}
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/chat/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=LONGEST_S) as answer:
        return str(json.loads(answer.read())["choices"][0]["message"]["content"])


def test_it_serves_the_target_and_leaves_nothing(python: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("NOTES", str(tmp_path / "notes.json"))
    monkeypatch.setenv("PYTHONPATH", "/ours")
    before = len(tree())
    with sglang.served(params(python, args=["--device", "cpu", "--tp", "2"]), tmp_path) as url:
        assert url.startswith("http://127.0.0.1:") and url.endswith("/v1")
        assert ask(url) == "re this"
        assert len(tree()) > before
    assert len(tree()) == before
    with pytest.raises(OSError, match="refused"):
        ask(url)
    notes = json.loads((tmp_path / "notes.json").read_text())
    argv = notes["argv"]
    given = dict(zip(argv[::2], argv[1::2], strict=False))
    assert given["--model-path"] == str(targets.locate(Target(model="builtin:tiny")))
    assert given["--served-model-name"] == "tiny" and given["--host"] == "127.0.0.1"
    assert argv[-4:] == ["--device", "cpu", "--tp", "2"] and "torch_native" in argv
    assert notes["python_path"] == str(sglang.CPU_MODULES) and "/ours" not in notes["path"]
    assert notes["cwd"] == str(tmp_path) and "" not in notes["path"] and str(tmp_path) not in notes["path"]
    log = (tmp_path / "logs/sglang.log").read_text().splitlines()
    assert "sglang.launch_server --model-path" in log[0] and log[2].startswith("READY")
    said = capsys.readouterr()
    assert said.out == "" and f"at {url}" in said.err and "logs/sglang.log" in said.err


def test_with_a_gpu_sglang_chooses_for_itself(python: Path, tmp_path: Path, monkeypatch) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(tmp_path / "notes.json"))
    with sglang.served(params(python), tmp_path):
        pass
    notes = json.loads((tmp_path / "notes.json").read_text())
    assert "--device" not in notes["argv"] and "torch_native" not in notes["argv"] and notes["python_path"] == ""


@pytest.mark.parametrize(
    ("fault", "patience_s", "complaint"),
    [
        ("dies", 60.0, r"did not start \(exit code 3\): ValueError: the weights are made of chalk \(.*sglang\.log\)$"),
        ("ends", 60.0, r"did not start \(exit code 9\): "),
        ("never healthy", 3.0, "never became healthy within 3 s"),
        ("other model", 60.0, "serves another-model, not tiny"),
    ],
)
def test_what_does_not_start_is_one_line(
    python: Path, tmp_path: Path, monkeypatch, fault: str, patience_s: float, complaint: str
) -> None:
    monkeypatch.setenv("FAULT", fault)
    before = len(tree())
    with (
        pytest.raises(ServerError, match=complaint) as caught,
        sglang.served(params(python, start_timeout_s=patience_s), tmp_path),
    ):
        pytest.fail("it was taken for a server that works")
    assert "\n" not in str(caught.value) and "sglang.log" in str(caught.value)
    assert len(tree()) == before


def test_a_server_that_ends_while_it_is_asked_explains_the_failure(python: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FAULT", "dies later")
    with (
        pytest.raises(ServerError, match=r"ended while it was in use \(exit code 9\): RuntimeError: out of chalk"),
        sglang.served(params(python), tmp_path) as url,
    ):
        with pytest.raises(OSError):
            ask(url)
        raise ServerError("no server left")


def test_failures_that_are_not_the_servers_stay_as_they_are(python: Path, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"^mine$"), sglang.served(params(python), tmp_path):
        raise ServerError("mine")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"python": "nowhere/bin/python"}, r"no environment with SGLang.*nowhere.*make setup-sglang"),
        ({"python": sys.executable}, "this interpreter has no SGLang"),
        ({"python": None}, "no interpreter and no image"),
        ({"python": None, "image": "lmsysorg/sglang"}, "'docker' not found"),
    ],
)
def test_a_missing_environment_is_one_line(tmp_path: Path, monkeypatch, given: dict[str, Any], complaint: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=complaint), sglang.served(params(**given), tmp_path):
        pass


def test_a_taken_port_is_one_line(python: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StageError, match=f"taken.*:{port}"), sglang.served(params(python, port=port), tmp_path):
            pass


def test_a_port_is_claimed_before_the_server_listens(python: Path, tmp_path: Path, monkeypatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
    start = [sys.executable, "-c", SERVE, "serve", "--root", str(tmp_path)]
    write_params(tmp_path, python, port)
    environment = {**os.environ, "FAULT": "never healthy"}
    first = subprocess.Popen(start, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert first.stderr is not None and "starting" in first.stderr.readline()
        with pytest.raises(StageError, match="taken"), sglang.served(params(python, port=port), tmp_path):
            pass
    finally:
        first.terminate()
        first.communicate(timeout=LONGEST_S)


# `python -m dllm serve`, with less patience: the monkeypatch above does not reach another process.
SERVE = """
import sys
from dllm.__main__ import main
from dllm.engines import sglang
sglang.GRACE_S = 2.0
main(sys.argv[1:])
"""


def write_params(root: Path, python: Path, port: int = 0) -> None:
    given = params(python, port=port).model_dump(mode="json", by_alias=True)
    (root / "params.yaml").write_text(json.dumps(given))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blow", "fault"), [(signal.SIGKILL, ""), (signal.SIGKILL, "stubborn"), (signal.SIGTERM, ""), (signal.SIGINT, "")]
)
def test_serve_stays_until_it_is_told_and_leaves_no_orphan(
    python: Path, tmp_path: Path, blow: signal.Signals, fault: str
) -> None:
    write_params(tmp_path, python)
    caller = subprocess.Popen(
        [sys.executable, "-c", SERVE, "serve", "--root", str(tmp_path)],
        env={**os.environ, "FAULT": fault},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert caller.stdout is not None
    url = caller.stdout.readline().strip()
    assert ask(url) == "re this"
    everything = psutil.Process(caller.pid).children(recursive=True)
    assert len(everything) >= 3
    caller.send_signal(blow)
    assert caller.wait(LONGEST_S) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[blow]
    gone, alive = psutil.wait_procs(everything, timeout=LONGEST_S)
    assert not alive and len(gone) == len(everything)


def test_serve_says_when_the_server_ends(python: Path, tmp_path: Path) -> None:
    write_params(tmp_path, python)
    caller = subprocess.Popen(
        [sys.executable, "-c", SERVE, "serve", "--root", str(tmp_path)],
        env={**os.environ, "FAULT": "dies later"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert caller.stdout is not None
    with pytest.raises(OSError):
        ask(caller.stdout.readline().strip())
    _, said = caller.communicate(timeout=LONGEST_S)
    assert caller.returncode == ServerError.exit_code
    assert said.splitlines()[-1].startswith("dllm: SGLang has ended (exit code 9): RuntimeError: out of chalk")


DOCKER = """#!/bin/sh
printf '%s\\n' "$@" > {notes}
while [ "$1" != {image} ]; do shift; done
shift
exec env PATH={path} "$@"
"""


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_container_sees_the_model_and_ends_with_the_caller(
    python: Path, tmp_path: Path, monkeypatch, snapshot: bool
) -> None:
    model = targets.locate(Target(model="builtin:tiny"))
    if snapshot:  # as the hub's cache has it
        place = tmp_path / "models--a--b" / "snapshots" / "0123"
        place.parent.mkdir(parents=True)
        place.symlink_to(model)
        model = place
    (python.parent / "python3").symlink_to(python)
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    path = f"{python.parent}:/usr/bin:/bin"
    docker.write_text(DOCKER.format(notes=tmp_path / "docker.txt", image="an/image", path=path))
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}:{os.environ['PATH']}")
    given = params(None, image="an/image", args=["--device", "cpu"])
    given = given.model_copy(update={"target": Target(model=str(model))})
    before = len(tree())
    with sglang.served(given, tmp_path) as url:
        assert url
    assert len(tree()) == before
    argv = (tmp_path / "docker.txt").read_text().splitlines()
    shown = tmp_path / "models--a--b" if snapshot else model
    assert argv[:2] == ["run", "--rm"] and f"{shown}:{shown}:ro" in argv and "--gpus" not in argv
    assert argv[argv.index("--model-path") + 1] == str(model)


def test_the_error_line_is_the_last_error() -> None:
    lines = [
        "[2026-11-23 22:00:01] INFO loading",
        "Traceback (most recent call last):",
        '  File "x.py", line 3, in <module>',
        "torch.OutOfMemoryError: CUDA out of memory",
        "",
        "Killed",
    ]
    assert sglang.error_line(lines) == "torch.OutOfMemoryError: CUDA out of memory"
    assert sglang.error_line(["launch_server.py: error: argument --tp: invalid int value: 'x'", ""]).endswith("'x'")
    assert sglang.error_line(["[2026-11-23 22:00:01 TP0] nothing more"]) == "nothing more"
    assert sglang.error_line([]) == "its log is empty"
