"""An interpreter that has a false SGLang: real processes and sockets, made-up words, and the fault a test asks for."""

from __future__ import annotations

import sys
from pathlib import Path

LAUNCH_SERVER = r"""
import argparse, http.server, json, os, pathlib, signal, subprocess, sys, time

fault = os.environ.get("FAULT", "")
parser = argparse.ArgumentParser()
for flag in ("model-path", "served-model-name", "dtype", "host", "port", "device"):
    parser.add_argument(f"--{flag}")
given, others = parser.parse_known_args()
print("[2026-11-23 22:00:00] server_args=ServerArgs(...)", flush=True)
if notes := os.environ.get("NOTES"):
    about = {"argv": sys.argv[1:], "path": sys.path, "python_path": os.environ["PYTHONSEEN"], "cwd": os.getcwd()}
    pathlib.Path(notes).write_text(json.dumps(about))
if fault == "dies":
    print("Traceback (most recent call last):\n  File x.py, line 1", file=sys.stderr)
    print("[2026-11-23 22:00:01 TP0] ValueError: the weights are made of chalk", file=sys.stderr)
    print("and so it goes", file=sys.stderr)
    sys.exit(3)
if fault == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
# As SGLang's scheduler, a process of its own: it inherits that SIGTERM is ignored.
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("READY", os.getpid(), flush=True)
began = time.monotonic()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = "another-model" if fault == "other model" else given.served_model_name
        late = time.monotonic() - began < 0.5
        if self.path == "/health":
            self.answer(503 if fault == "never healthy" or late else 200, None)
        elif self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": name, "object": "model"}]})
        elif self.path == "/model_info":
            self.answer(200, {"model_path": given.model_path})
        else:
            self.answer(404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if fault == "dies later" and body["max_tokens"] > 1:
            print("RuntimeError: out of chalk", file=sys.stderr, flush=True)
            os._exit(9)
        if fault == "ends":
            os._exit(9)
        words = body["messages"][-1]["content"]
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f"re {words}"}}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        self.answer(200, {**reply, "choices": [choice], "usage": usage})

    def answer(self, status, value):
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer((given.host, int(given.port)), Handler).serve_forever()
"""


def make_environment(folder: Path) -> Path:
    """Make an interpreter in `folder` that finds a `sglang` distribution; return its path."""
    package = folder / "packages" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(LAUNCH_SERVER)
    described = folder / "packages" / "sglang-0.5.23.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.23\n")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    places = f'PYTHONPATH="{folder}/packages${{PYTHONPATH:+:$PYTHONPATH}}"'
    python.write_text(f'#!/bin/sh\nPYTHONSEEN="$PYTHONPATH" {places} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python
