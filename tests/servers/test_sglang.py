"""SGLang itself, on whatever the machine has: its whole life, and regenerate through it. Run by `make test-sglang`."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dllm.engines import sglang
from dllm.engines.openai.servers import URL_VARIABLE
from dllm.errors import ServerError
from dllm.models import targets
from dllm.prompts import template as chat
from dllm.responses import shards
from tests.patience import LONGEST_S
from tests.servers.conftest import PROMPTS, SERVED, TOKENS, Project
from tests.servers.questions import ask, metric


@pytest.fixture(scope="module")
def serving(project: Project) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`dllm serve` as a person runs it, and the address it prints."""
    project.write()
    child = project.start("serve", stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        url = child.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), (project.root / sglang.LOG).read_text()[-3000:]
        yield child, url
    finally:
        child.terminate()
        child.wait(LONGEST_S)


def check_rows(folder: Path) -> list[shards.Row]:
    """Make sure that every question is answered once, by the ids of what was said."""
    rows = shards.read_rows(folder)
    assert Counter((row.sample, row.turn) for row in rows) == {(0, 0): PROMPTS}
    assert len({row.prompt_id for row in rows}) == PROMPTS
    for row in rows:
        # Text goes through the tokenizer again, which may cut it otherwise than the target wrote it.
        assert 1 <= row.num_tokens == len(row.answer_ids) <= 1.2 * TOKENS
        assert row.messages[-1]["role"] == "assistant" and row.messages[-1]["content"]
    assert Counter(row.finish_reason for row in rows).keys() <= {"stop", "length"}
    return rows


def test_it_writes_what_the_target_writes(project: Project, serving: tuple[subprocess.Popen[str], str]) -> None:
    _, url = serving
    said = ask(url, "What is 2 + 3?", TOKENS)
    target = project.write().target
    tokenizer, model = targets.load_tokenizer(target), targets.load_target(target)
    ids = chat.prompt_ids(tokenizer, [{"role": "user", "content": "What is 2 + 3?"}])
    import torch

    own = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :]
    text = tokenizer.decode(own, skip_special_tokens=True)
    # Kernels round differently in bfloat16, so texts may part; not at once.
    assert said.split()[:5] == text.split()[:5], f"{said!r} is not {text!r}"
    assert metric(url, "sglang:num_requests_total") >= 1


def test_regenerate_asks_it_and_goes_on_after_a_kill(
    project: Project, serving: tuple[subprocess.Popen[str], str]
) -> None:
    _, url = serving
    words = project.regenerate(url, "killed")
    child = project.start(*words)
    end = time.monotonic() + 600
    while journalled(project.root / "killed") < 3:
        assert child.poll() is None and time.monotonic() < end, "no answer was kept"
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = journalled(project.root / "killed")
    assert not (project.root / "killed" / "manifest.json").exists()
    done = json.loads(project.run(*words, "--resume", "--json").splitlines()[-1])
    print(f"\nkilled after {kept} answers, then: {done}")
    rows = check_rows(project.root / "killed")
    project.run("data", "verify", "killed")
    manifest = shards.read_manifest(project.root / "killed")
    assert manifest["rows"] == len(rows) == PROMPTS
    assert SERVED in json.dumps(manifest)


def journalled(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(".work/**/*.jsonl"))


def test_death_of_the_caller_takes_it_along(project: Project, serving: tuple[subprocess.Popen[str], str]) -> None:
    child, url = serving
    everything = psutil.Process(child.pid).children(recursive=True)
    assert len(everything) > 3 and processes_of_sglang(project)
    child.send_signal(signal.SIGKILL)
    child.wait()
    _, alive = psutil.wait_procs(everything, timeout=LONGEST_S)
    assert not alive
    with pytest.raises(OSError):
        ask(url, "Anybody there?", 1)


def test_what_it_complains_of_is_one_line(project: Project) -> None:
    params = project.write()
    own = params.regenerate.sglang.model_copy(update={"args": ["--attention-backend", "abacus"]})
    params = params.model_copy(update={"regenerate": params.regenerate.model_copy(update={"sglang": own})})
    with (
        pytest.raises(ServerError, match=r"SGLang did not start \(exit code \d+\): .*abacus") as caught,
        sglang.served(params, project.root),
    ):
        pass
    print(f"\n{caught.value}")


def test_the_stage_starts_it_and_takes_it_down(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    project.write(engine="sglang")
    before = processes_of_sglang(project)
    project.run("regenerate")
    assert processes_of_sglang(project) <= before
    check_rows(project.root / "out" / "regenerate")


def processes_of_sglang(project: Project) -> set[int]:
    """Find servers that work in the project's folder; tests of other checkouts may run theirs beside it."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_here = Path(process.cwd()) == project.root
            if is_here and re.search(r"sglang::|sglang\.launch_server", " ".join(process.cmdline())):
                found.add(process.pid)
    return found
