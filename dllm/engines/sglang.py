"""A SGLang server that we start: in an environment of its own, watched to its first token, and taken down whole.

Owns the command line, the environment and the port SGLang is started with, and the one line that says why it died.
`dllm serve` and engine `sglang` of `regenerate` both come here.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from dllm.config.params import Params, Sglang
from dllm.engines.readiness import await_token
from dllm.errors import ConfigError, ServerError, StageError
from dllm.models import builtin, targets
from dllm.process import children as process

HOST = "127.0.0.1"
LOG = Path("logs") / "sglang.log"
GRACE_S = 10.0
"""From SIGTERM to SIGKILL: half of what a flow grants the stage that waits for this server."""
CPU_FLAGS = (
    "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
    "--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled",
    # SGLang would take most of the memory otherwise, and decode ten times slower.
    "--max-total-tokens", "16384", "--max-running-requests", "32",
)  # fmt: skip
CPU_MODULES = Path(__file__).parents[2] / "infra" / "sglang_cpu"
LOG_END = 200_000
"""Bytes of the log's end that are searched for the reason of a failure."""
LOOK_EVERY_S = 0.5
_ERROR = re.compile(r"(?:^|\s)(?:\w+\.)*[A-Z]\w*(?:Error|Exception)\b:? |: error: ")
_STAMP = re.compile(r"^\[[\d-]+ [\d:]+[^\]]*\] |\x1b\[[\d;]*m")


class Server:
    """A SGLang server that was started.

    Args:
        child: its process.
        log: the file its lines go to, which may hold those of earlier servers.
        skip: bytes of the log that are not this server's.
    """

    def __init__(self, url: str, child: process.Background, log: Path, skip: int) -> None:
        self.url = url
        """Its address, with /v1."""
        self._child, self._log, self._skip = child, log, skip

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._child.ended

    def stay(self) -> NoReturn:
        """Wait until the server ends by itself.

        Raises:
            ServerError: it has.
        """
        while not self.ended:
            time.sleep(LOOK_EVERY_S)
        raise self.complaint("SGLang has ended")

    def complaint(self, what: str, hint: str | None = None) -> ServerError:
        """Say in one line what is wrong, how it ended if it has, and what its log says of the reason."""
        if self.ended:
            what += f" (exit code {self._child.result().code})"
        with self._log.open("rb") as log:
            log.seek(max(self._skip, self._log.stat().st_size - LOG_END))
            said = telling_line(log.read().decode("utf-8", "replace").splitlines())
        return ServerError(f"{what}: {said}", where=str(self._log), hint=hint)


@contextmanager
def served(params: Params, root: Path) -> Iterator[str]:
    """Keep a SGLang server with the target for as long as the `with` block lasts; yield its address, with /v1.

    When the block fails because the server has ended, the error says why it has.

    Raises:
        ConfigError: SGLang's environment is missing.
        StageError: the port is taken.
        ModelError: the target cannot be found.
        ServerError: the server ends, serves another model, or writes no token in time.
    """
    with launched(params, root) as server:
        try:
            yield server.url
        except ServerError:
            if server.ended:
                raise server.complaint("SGLang ended while it was asked") from None
            raise


@contextmanager
def launched(params: Params, root: Path) -> Iterator[Server]:
    """Start a SGLang server with the target, wait for its first token, and stop its whole tree in the end.

    Args:
        params: `target`, `regenerate.sglang` and `regenerate.served_model` are read.
        root: the project's folder; the log goes to logs/sglang.log in it.

    Raises: as `served`.
    """
    settings, name = params.regenerate.sglang, served_name(params)
    on_cpu, log = _on_cpu(settings.args), root / LOG
    python = _interpreter(settings, root)  # complains before a model is fetched
    model = targets.locate(params.target).absolute()
    program = [str(python)] if python else _in_container(str(settings.image), model, on_cpu)
    with ExitStack() as stack:
        port = _take_port(stack, settings.port)
        url = f"http://{HOST}:{port}"
        argv = [*program, "-m", "sglang.launch_server", *_flags(params, model, name, port, on_cpu)]
        skip = _begin_log(log, argv)
        print(f"sglang: starting with {params.target.model}; its log is {LOG}", file=sys.stderr, flush=True)
        began = time.monotonic()
        background = process.background(argv, env=_environment(python, on_cpu), cwd=root, log_file=log, grace_s=GRACE_S)
        child = stack.enter_context(background)
        server = Server(f"{url}/v1", child, log, skip)
        try:
            await_token(url, name, child, name="sglang", path=str(model), timeout_s=settings.start_timeout_s)
        except ServerError as error:
            if not server.ended:
                raise server.complaint(error.message, error.hint) from None
        if server.ended:
            raise server.complaint("SGLang did not start")
        took_s = time.monotonic() - began
        print(f"sglang: ready after {took_s:.0f} s at {server.url} as {name}", file=sys.stderr, flush=True)
        yield server


def served_name(params: Params) -> str:
    """Tell the name the server knows the target by: SGLang keeps colons for adapters, and refuses them in names."""
    name = params.regenerate.served_model or params.target.model
    return name.removeprefix(builtin.PREFIX).replace(":", "-")


def telling_line(lines: Sequence[str]) -> str:
    """Pick the line of a log that says best why a program ended: its last error, else its last line."""
    said = [_STAMP.sub("", line).strip() for line in lines if line.strip()]
    errors = [line for line in said if _ERROR.search(line)]
    return (errors or said or ["it said nothing"])[-1][:400]


def _interpreter(settings: Sglang, root: Path) -> Path | None:
    """Return the interpreter that has SGLang; None where a container image has it."""
    if settings.image is not None:
        if shutil.which("docker") is None:
            raise ConfigError("program 'docker' not found", where=f"regenerate.sglang.image: {settings.image}")
        return None
    where, hint = f"regenerate.sglang.python: {settings.python}", "run `make setup-sglang`, or name another interpreter"
    if settings.python is None:
        raise ConfigError("no interpreter and no image that has SGLang", where=where, hint=hint)
    # Not resolved: a virtual environment's interpreter is a link, and known by its place.
    python = root / Path(settings.python).expanduser()
    if not os.access(python, os.X_OK):
        raise ConfigError("no environment with SGLang there", where=where, hint=hint)
    ask = [str(python), "-c", "import importlib.metadata as m; m.version('sglang')"]
    environment = {**os.environ, **_environment(python, on_cpu=False)}
    if subprocess.run(ask, env=environment, capture_output=True, check=False).returncode:
        raise ConfigError("this interpreter has no SGLang", where=where, hint=hint)
    return python


def _environment(python: Path | None, on_cpu: bool) -> dict[str, str]:
    """Keep all of ours from being imported in there: what PYTHONPATH names, and what lies in the working directory."""
    if python is None:
        return {}
    return {
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": str(CPU_MODULES) if on_cpu else "",
        "PYTHONHOME": "",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _in_container(image: str, model: Path, on_cpu: bool) -> list[str]:
    """Return the command line up to the interpreter of a container that sees the model and the host's loopback."""
    # Files of a hub snapshot are links into its repository's blobs.
    shown = model.parents[1] if model.parent.name == "snapshots" else model
    argv = ["docker", "run", "--rm", "--network", "host", "--ipc", "host", "--volume", f"{shown}:{shown}:ro"]
    if on_cpu:
        argv += ["--volume", f"{CPU_MODULES}:{CPU_MODULES}:ro", "--env", f"PYTHONPATH={CPU_MODULES}"]
    else:
        argv += ["--gpus", "all"]
    # The client hands SIGTERM on; `timeout` then ends the container, before the client is killed and cannot.
    return [*argv, image, "timeout", "--kill-after", f"{GRACE_S / 2:g}", "0", "python3"]


def _flags(params: Params, model: Path, name: str, port: int, on_cpu: bool) -> list[str]:
    flags = ["--model-path", str(model), "--served-model-name", name, "--dtype", params.target.dtype]
    flags += ["--host", HOST, "--port", str(port), "--enable-metrics"]
    flags += ["--trust-remote-code"] if params.target.trust_remote_code else []
    flags += CPU_FLAGS if on_cpu else ()
    return [*flags, *params.regenerate.sglang.args]  # last, where they win


def _on_cpu(args: Sequence[str]) -> bool:
    """Tell whether SGLang is to run on the CPU: where `args` say so, or say nothing and there is no GPU."""
    joined = " ".join(args).replace("--device=", "--device ").split()
    if "--device" in joined[:-1]:
        return joined[joined.index("--device") + 1] == "cpu"
    try:
        seen = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return True
    return seen.returncode != 0 or b"GPU" not in seen.stdout


def _take_port(stack: ExitStack, wanted: int) -> int:
    """Choose a port and claim it until the stack ends.

    SGLang listens only once the model is loaded. Until then the port looks free to another call of ours, which would
    then take the first server to answer there for its own; hence the claim.
    """
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, wanted))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                raise _taken(wanted) from None
            port = int(probe.getsockname()[1])
        if _claimed(stack, port):
            return port
        if wanted:
            raise _taken(wanted)


def _claimed(stack: ExitStack, port: int) -> bool:
    if sys.platform != "linux":
        return True
    claim = stack.enter_context(socket.socket(socket.AF_UNIX))
    try:
        claim.bind(f"\0dllm-port-{port}")  # a name without a file: it goes when we do, however that is
    except OSError:
        return False
    return True


def _taken(port: int) -> StageError:
    hint = "stop what listens there, or set regenerate.sglang.port to another; 0 takes a free one"
    return StageError("the port is taken", where=f"{HOST}:{port}", hint=hint)


def _begin_log(log: Path, argv: Sequence[str]) -> int:
    """Note in the log what is started, and return the log's length."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        stream.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(argv)}\n")
        stream.flush()
        return stream.tell()
