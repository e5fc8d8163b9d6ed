"""Huge pages: asked for once, by the same process, and faults that no longer come."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm.process.huge_pages import TUNABLES

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
STEPS = """
import os, resource, sys, torch
from dllm.process.huge_pages import restart_with_huge_pages
print(os.getpid())
if sys.argv[1] == "huge":
    restart_with_huge_pages()
def step():
    torch.ones(20_000_000).sum()
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, os.environ.get("GLIBC_TUNABLES"), sys.argv[2])
"""


def steps(word: str, tunables: str | None = None) -> list[str]:
    tuned = ("MALLOC_", TUNABLES, "LD_PRELOAD", "THP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(tuned)}
    environment |= {} if tunables is None else {TUNABLES: tunables}
    argv = [sys.executable, "-u", "-c", STEPS, word, "a b"]
    return subprocess.run(argv, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()


@pytest.mark.skipif(not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="the kernel has no huge pages")
def test_huge_pages_need_few_faults() -> None:
    faults = [int(steps(word)[-1].split()[0]) for word in ("huge", "small")]
    assert faults[0] < faults[1] / 2


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_the_same_process_starts_anew_once_with_its_arguments() -> None:
    before, after, last = steps("huge", "glibc.malloc.check=0")
    assert before == after
    assert last.split(maxsplit=1)[1] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1 a b"
    alone = steps("huge", "glibc.malloc.hugetlb=0")
    assert len(alone) == 2 and alone[-1].endswith("glibc.malloc.hugetlb=0 a b")
