"""Importing computes nothing: no file written, no network, no process, no CUDA, no logging set up."""

import json
import subprocess
import sys

from tests.arch.source_tree import ROOT, module_name, python_files
from tests.patience import LONGEST_S

WATCH = """
import importlib, json, logging, os, signal, sys, threading
# What third-party packages do when first imported is not ours to answer for.
import aiohttp, datasets, matplotlib.pyplot, mlflow, prefect, pyarrow.parquet, torch, transformers, typer
import transformers.modeling_utils
import lm_eval.api.model, rich.progress, safetensors.torch, psutil, pydantic, yaml

OUTWARD = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.mkdir", "os.fork", "os.putenv"}
seen, module = [], None
def watch(event, args):
    if module is None or ".pyc" in str(args[:1]):
        return
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event in OUTWARD:
        seen.append([module, event, str(args)[:200]])
sys.addaudithook(watch)

def state():
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    root = logging.getLogger()
    return [str(handlers), threading.active_count(), str(root.handlers), root.level, torch.get_num_threads(),
            torch.cuda.is_initialized(), str(torch.get_default_dtype()), torch.initial_seed(), str(sys.excepthook)]

before = state()
for module in sys.argv[1:]:
    importlib.import_module(module)
    now = state()
    if now != before:
        seen.append([module, "state", str(now)])
        before = now
module = None
print(json.dumps(seen))
"""

START_UP = """
import sys
import dllm.__main__, dllm.cli.app
print([name for name in sys.argv[1:] if name in sys.modules])
"""
SLOW_TO_IMPORT = (
    "torch",
    "transformers",
    "mlflow",
    "datasets",
    "pyarrow",
    "numpy",
    "matplotlib",
    "aiohttp",
    "pydantic",
)


def test_importing_any_module_changes_nothing() -> None:
    modules = [name for path in python_files("dllm") if (name := module_name(path)) != "dllm.__main__"]
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    done = subprocess.run(
        [sys.executable, "-c", START_UP, *SLOW_TO_IMPORT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
