"""Stages struck by signals at random moments: every exit is documented, nothing is left, the result stays the same.

`python -m tests.kill.blows STAGE ... --blows 200` prints how often each exit code came, and every exit that was wrong.
Calls are forked from a process that has imported everything; the launcher of ranks (stage `train2`) starts anew.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import yaml

from dllm.config import recipe_book
from tests.arch.source_tree import ROOT

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STAGES = ("prepare", "regenerate", "train", "train2", "evaluate", "register")
IN_TIME_S = 30.0
"""From a blow to the end of the process; a busy machine needs some of it."""

FORKING = """
import json, os, signal, sys
import mlflow, mlflow.store.tracking.sqlalchemy_store, pyarrow.parquet, torch, transformers
import dllm.cli.app
from dllm import __main__ as command
from dllm.stages import evaluate, prepare, regenerate, register, train
print("ready", flush=True)
for line in sys.stdin:
    log, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.write(said, b"started\\n")
        command.main(arguments)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclasses.dataclass
class Blow:
    """What was done to one call, and how it ended."""

    stage: str
    after_s: float
    numbers: tuple[int, ...]
    code: int = 0
    seconds: float = 0.0
    said: str = ""
    wrong: list[str] = dataclasses.field(default_factory=list)


class Struck:
    """A project whose stages are called and struck.

    Args:
        folder: an empty folder for it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "data", folder / "data")
        params = yaml.safe_load(recipe_book.text("tiny-dflash"))
        params["prepare"]["sources"][0]["limit"] = 24
        params["regenerate"]["max_new_tokens"] = 8
        params["train"] |= {"epochs": 60, "validate_every": 40}
        params["evaluate"] |= {"num_prompts": 4, "max_new_tokens": 8, "identity_prompts": 2}
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        self._log = folder / "said.txt"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DLLM_TARGET"))}
        self.environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._seconds: dict[str, float] = {}
        self._digests: dict[str, str] = {}

    @contextlib.contextmanager
    def started(self) -> Iterator[Struck]:
        """Run the process that calls are forked from."""
        argv = [sys.executable, "-c", FORKING]
        with subprocess.Popen(
            argv, cwd=self.folder, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as self._forking:
            assert self._read() == "ready"
            yield self
            assert self._forking.stdin is not None
            self._forking.stdin.close()

    def undisturbed(self, stage: str) -> None:
        """Run a stage to its end: how long it takes, and what it publishes."""
        began = time.monotonic()
        self._start(stage)
        assert self._wait(stage) == 0, self._log.read_text()
        self._seconds[stage] = time.monotonic() - began
        self._digests[stage] = self._digest(stage)

    def strike(self, stage: str, chance: random.Random) -> Blow:
        """Call a stage, from nothing or from what the last call left, and send it one signal or two."""
        if chance.random() < 0.5:
            shutil.rmtree(self.folder / "work" / stage.removesuffix("2"), ignore_errors=True)
        blow = Blow(stage, chance.uniform(0.0, 1.05 * self._seconds[stage]), (chance.choice(SIGNALS),))
        if chance.random() < 0.3:
            blow.numbers += (chance.choice(SIGNALS),)
        pid = self._start(stage)
        session = psutil.Process(pid)
        time.sleep(blow.after_s)
        struck = time.monotonic()
        for number in blow.numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            time.sleep(chance.uniform(0.0, 0.3) if len(blow.numbers) > 1 else 0)
        blow.code = self._wait(stage)
        blow.seconds = time.monotonic() - struck
        blow.said = self._log.read_text(errors="replace")
        blow.wrong = list(self._faults(blow, session.pid))
        return blow

    def finish(self, stage: str) -> list[str]:
        """Run the stage to its end after all blows; return what is wrong with its result."""
        self._start(stage)
        if code := self._wait(stage):
            return [f"{stage}: the last call ended with {code}: {self._log.read_text()[-500:]}"]
        if self._digest(stage) != self._digests[stage]:
            return [f"{stage}: another result than that of an undisturbed run"]
        return []

    def _faults(self, blow: Blow, session: int) -> Iterator[str]:
        # In its first and its last moments a process has Python's own handlers, and a signal may end it by itself.
        allowed = {0, *(128 + n for n in blow.numbers), *(-n for n in blow.numbers)}
        if blow.code not in allowed:
            yield f"exit code {blow.code}"
        if any(word in blow.said for word in ("Traceback", "unexpected", "a bug", "Exception ignored")):
            yield "more than a line"
        if blow.seconds > IN_TIME_S:
            yield f"took {blow.seconds:.1f} s to end"
        if left := [p.pid for p in psutil.process_iter() if _session(p.pid) == session]:
            yield f"left processes {left}"
        if bad := self.statuses() & {"RUNNING", "FAILED"}:
            yield f"MLflow says {', '.join(sorted(bad))}"

    def statuses(self) -> set[str]:
        """Return the statuses that MLflow has of runs."""
        if not (self.folder / "mlflow.db").exists():
            return set()
        with contextlib.closing(sqlite3.connect(self.folder / "mlflow.db", timeout=30)) as database:
            return {status for (status,) in database.execute("select distinct status from runs")}

    def _start(self, stage: str) -> int:
        options = ["--set", "train.nproc=2"] if stage == "train2" else []
        arguments = [stage.removesuffix("2"), *options]
        if stage == "train2":
            with self._log.open("w") as said:
                self._ranks = subprocess.Popen(
                    [sys.executable, "-m", "dllm", *arguments], cwd=self.folder, env=self.environment,
                    stdout=said, stderr=said, start_new_session=True,
                )  # fmt: skip
            return self._ranks.pid
        assert self._forking.stdin is not None
        print(json.dumps([str(self._log), *arguments]), file=self._forking.stdin, flush=True)
        pid = int(self._read())
        end = time.monotonic() + 30
        while not (self._log.exists() and self._log.read_text().startswith("started")) and time.monotonic() < end:
            time.sleep(0.002)
        return pid

    def _wait(self, stage: str) -> int:
        return self._ranks.wait() if stage == "train2" else int(self._read())

    def _read(self) -> str:
        assert self._forking.stdout is not None
        return self._forking.stdout.readline().strip()

    def _digest(self, stage: str) -> str:
        total = hashlib.sha256()
        for path in sorted((self.folder / "out" / stage.removesuffix("2")).rglob("*")):
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                rows = table.drop_columns([name for name in table.column_names if name.startswith("ms_per_token")])
                total.update(repr(rows.to_pylist()).encode())
            elif path.suffix == ".safetensors":
                total.update(path.read_bytes())
        return total.hexdigest()


def _session(pid: int) -> int | None:
    with contextlib.suppress(OSError, psutil.Error):
        if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            return os.getsid(pid)
    return None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("stages", nargs="*", default=STAGES)
    parser.add_argument("--blows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    num_wrong = 0
    with Struck(options.folder).started() as struck:
        for stage in STAGES:
            struck.undisturbed(stage)
            if stage not in options.stages:
                continue
            chance, codes = random.Random(f"{options.seed}{stage}"), collections.Counter[int]()
            wrong = []
            for _ in range(options.blows):
                blow = struck.strike(stage, chance)
                codes[blow.code] += 1
                if blow.wrong:
                    print(f"WRONG {blow}", flush=True)
                    wrong.append(blow)
            faults = struck.finish(stage)
            num_wrong += len(wrong) + len(faults)
            counts = ", ".join(f"{code}: {count}" for code, count in sorted(codes.items()))
            print(f"{stage}: {options.blows} blows, {len(wrong)} wrong; {counts}", *faults, flush=True)
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
