"""Engine `sglang`, and the SGLang server behind it and behind `dllm serve`.

The server is started in an environment of its own, watched until its first token, and stopped with all its processes.
Owns its command line, environment and port, and the one-line reason where it fails.
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

from transformers import PreTrainedTokenizerBase

from dllm.config.params import Params
from dllm.config.regenerate import Sglang
from dllm.engines.openai.engine import OpenAIEngine
from dllm.engines.readiness import wait_until_ready
from dllm.errors import ConfigError, ServerError, StageError
from dllm.files import open_to_append
from dllm.models import builtin, targets
from dllm.outside import one_line
from dllm.process import children as process
from dllm.process import gpus, signals

HOST = "127.0.0.1"
LOG = Path("logs") / "sglang.log"
GRACE_S = 10.0
"""From SIGTERM to SIGKILL: half of the time that a flow gives the stage that waits for this server."""
CPU_FLAGS = (
    "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
    "--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled",
    # By default SGLang takes most of the memory, and decodes ten times slower.
    "--max-total-tokens", "16384", "--max-running-requests", "32",
)  # fmt: skip
CPU_MODULES = Path(__file__).with_name("sglang_cpu")
"""Modules that SGLang lacks on a machine without a GPU: package data, never imported here."""
LOG_END = 200_000
"""Bytes at the end of the log that are searched for the reason of a failure."""
LOOK_EVERY_S = 0.5
POLL_INTERVAL_S = 0.05
ENDING_S = 2.0
"""From the first request that a server refuses to the end of its process, where it is ending."""
_ERROR = re.compile(r"(?:^|\s)(?:\w+\.)*[A-Z]\w*(?:Error|Exception)\b:? |: error: ")
_STAMP = re.compile(r"^\[[\d-]+ [\d:]+[^\]]*\] |\x1b\[[\d;]*m")


class SglangEngine(OpenAIEngine):
    """Generate with a SGLang server that is started for the engine and stopped with it."""

    affects = frozenset({"served_model", "sglang"})
    is_external = False
    generates = True

    @classmethod
    @contextmanager
    def open(
        cls, params: Params, tokenizer: PreTrainedTokenizerBase, root: Path, servers: Sequence[str] | None = None
    ) -> Iterator[SglangEngine]:
        with served(params, root) as url:
            settings = params.regenerate.model_copy(update={"served_model": served_name(params)})
            yield cls([url], settings, params.target, tokenizer)


class Server:
    """A SGLang server that was started.

    Args:
        child: its process.
        log: the file that its output goes to; it may hold the output of earlier servers.
        skip: bytes of the log before this server's output.
    """

    def __init__(self, url: str, child: process.Background, log: Path, skip: int) -> None:
        self.url = url
        """Its address, with /v1."""
        self._child, self._log, self._skip = child, log, skip

    @property
    def ended(self) -> bool:
        """Whether its process has ended."""
        return self._child.ended

    def stay(self) -> NoReturn:
        """Wait until the server ends.

        Raises:
            ServerError: it has ended.
        """
        while not self.ended:
            signals.sleep(LOOK_EVERY_S)
        raise self.error("SGLang has ended")

    def ends_within(self, seconds: float) -> bool:
        """Wait for the server's end, for so long at most; return whether it has ended."""
        end = time.monotonic() + seconds
        while not self.ended and time.monotonic() < end:
            signals.sleep(POLL_INTERVAL_S)
        return self.ended

    def error(self, what: str, hint: str | None = None) -> ServerError:
        """Make an error of one line: what is wrong, the exit code where it has ended, and the reason in its log."""
        if self.ended:
            what += f" (exit code {self._child.result().code})"
        with self._log.open("rb") as log:
            log.seek(max(self._skip, self._log.stat().st_size - LOG_END))
            reason = error_line(log.read().decode("utf-8", "replace").splitlines())
        return ServerError(f"{what}: {reason}", where=str(self._log), hint=hint)


@contextmanager
def served(params: Params, root: Path) -> Iterator[str]:
    """Run a SGLang server with the target for as long as the `with` block lasts; yield its address, with /v1.

    Where the block fails because the server has ended, the error has the reason.

    Raises:
        ConfigError: SGLang's environment is missing.
        StageError: the port is taken.
        ModelError: the target cannot be found.
        ServerError: the server ends, serves another model, or generates no token in time.
    """
    with launched(params, root) as server:
        try:
            yield server.url
        except ServerError:
            if server.ends_within(ENDING_S):  # its sockets close before its process is gone
                raise server.error("SGLang ended while it was in use") from None
            raise


@contextmanager
def launched(params: Params, root: Path) -> Iterator[Server]:
    """Start a SGLang server with the target, wait for its first token, and stop all its processes at the end.

    Args:
        params: `target`, `regenerate.sglang` and `regenerate.served_model` are read.
        root: the project's folder; the log goes to logs/sglang.log in it.

    Raises: as `served`.
    """
    settings, name = params.regenerate.sglang, served_name(params)
    on_cpu, log = _on_cpu(settings.args), root / LOG
    python = _interpreter(settings, root)  # before a model is downloaded
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
            timeout_s = settings.start_timeout_s
            wait_until_ready(server.url, name, child, name="sglang", path=str(model), timeout_s=timeout_s)
        except ServerError as error:
            if not server.ended:
                raise server.error(error.message, error.hint) from None
        if server.ended:
            raise server.error("SGLang did not start")
        took_s = time.monotonic() - began
        print(f"sglang: ready after {took_s:.0f} s at {server.url} as {name}", file=sys.stderr, flush=True)
        yield server


def served_name(params: Params) -> str:
    """Return the name that the server knows the target under: SGLang reserves colons for adapters."""
    name = params.regenerate.served_model or params.target.model
    return name.removeprefix(builtin.PREFIX).replace(":", "-")


def error_line(lines: Sequence[str]) -> str:
    """Pick the line of a log that explains best why a program ended: its last error, else its last line."""
    logged = [_STAMP.sub("", line).strip() for line in lines if line.strip()]
    errors = [line for line in logged if _ERROR.search(line)]
    return one_line((errors or logged or ["its log is empty"])[-1], 400)


def _interpreter(settings: Sglang, root: Path) -> Path | None:
    """Return the interpreter that has SGLang; None where a container image has it."""
    if settings.image is not None:
        if shutil.which("docker") is None:
            raise ConfigError("program 'docker' not found", where=f"regenerate.sglang.image: {settings.image}")
        return None
    where, hint = f"regenerate.sglang.python: {settings.python}", "run `make setup-sglang`, or name another interpreter"
    if settings.python is None:
        raise ConfigError("no interpreter and no image that has SGLang", where=where, hint=hint)
    # Not resolved: a virtual environment's interpreter is a link, and finds the environment by its own path.
    python = root / Path(settings.python).expanduser()
    if not os.access(python, os.X_OK):
        raise ConfigError("no environment with SGLang there", where=where, hint=hint)
    probe = [str(python), "-c", "import importlib.metadata as m; m.version('sglang')"]
    environment = {**os.environ, **_environment(python, on_cpu=False)}
    try:
        has_sglang = subprocess.run(probe, env=environment, capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise ConfigError(f"no interpreter that runs here: {error.strerror}", where=where, hint=hint) from None
    if not has_sglang:
        raise ConfigError("this interpreter has no SGLang", where=where, hint=hint)
    return python


def _environment(python: Path | None, on_cpu: bool) -> dict[str, str]:
    """Keep this process's packages out of the server: those on PYTHONPATH, and those in the working directory."""
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
    """Return the command line, up to the interpreter, of a container with the model and the host's loopback."""
    # The files of a hub snapshot are links into its repository's blobs.
    mounted = model.parents[1] if model.parent.name == "snapshots" else model
    argv = ["docker", "run", "--rm", "--network", "host", "--ipc", "host", "--volume", f"{mounted}:{mounted}:ro"]
    if on_cpu:
        argv += ["--volume", f"{CPU_MODULES}:{CPU_MODULES}:ro", "--env", f"PYTHONPATH={CPU_MODULES}"]
    else:
        argv += ["--gpus", "all"]
    # The client forwards SIGTERM; `timeout` then ends the container before the client itself is killed.
    return [*argv, image, "timeout", "--kill-after", f"{GRACE_S / 2:g}", "0", "python3"]


def _flags(params: Params, model: Path, name: str, port: int, on_cpu: bool) -> list[str]:
    flags = ["--model-path", str(model), "--served-model-name", name, "--dtype", params.target.dtype]
    flags += ["--host", HOST, "--port", str(port), "--enable-metrics"]
    flags += ["--trust-remote-code"] if params.target.trust_remote_code else []
    flags += CPU_FLAGS if on_cpu else ()
    return [*flags, *params.regenerate.sglang.args]  # last, where they win: `OWN_OPTIONS` are not among them


def _on_cpu(args: Sequence[str]) -> bool:
    """Return whether SGLang runs on the CPU: by `--device` in `args`, else where there is no GPU."""
    joined = " ".join(args).replace("--device=", "--device ").split()
    if "--device" in joined[:-1]:
        return joined[joined.index("--device") + 1] == "cpu"
    return not gpus.has_gpu()


def _take_port(stack: ExitStack, requested: int) -> int:
    """Choose a port and claim it until the stack ends.

    SGLang listens only once the model is loaded. Until then the port looks free to another call of this function, which
    would then mistake the first server to respond there for its own.
    """
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, requested))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise _taken(requested) from None
                raise StageError(
                    f"cannot listen on this port: {error.strerror}",
                    where=f"{HOST}:{requested}",
                    hint="set regenerate.sglang.port to another; 0 takes a free one",
                ) from None
            port = int(probe.getsockname()[1])
        if _claimed(stack, port):
            return port
        if requested:
            raise _taken(requested)


def _claimed(stack: ExitStack, port: int) -> bool:
    if sys.platform != "linux":
        return True
    claim = stack.enter_context(socket.socket(socket.AF_UNIX))
    try:
        claim.bind(f"\0dllm-port-{port}")  # an abstract name: it vanishes with this process, also when killed
    except OSError:
        return False
    return True


def _taken(port: int) -> StageError:
    hint = "stop what listens there, or set regenerate.sglang.port to another; 0 takes a free one"
    return StageError("the port is taken", where=f"{HOST}:{port}", hint=hint)


def _begin_log(log: Path, argv: Sequence[str]) -> int:
    """Write the command line into the log, and return the log's length."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(open_to_append(log), "a") as stream:
        stream.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(argv)}\n")
        stream.flush()
        return stream.tell()
