"""Reading parquet starts no thread, which might outlive it."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dllm.prompts.files.arrow import read_table
from tests.arch.source_tree import PACKAGE, python_files
from tests.patience import LONGEST_S

COUNT = """
import os, sys
from pathlib import Path
from dllm.prompts.files.arrow import parquet_rows, read_table
before = len(os.listdir("/proc/self/task"))
assert read_table(Path(sys.argv[1])).num_rows == len(list(parquet_rows(Path(sys.argv[1])))) == 5000
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    table = pa.table({"a": [str(number) for number in range(5000)], "b": [[1, 2]] * 5000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    return tmp_path / "a.parquet"


def test_the_table_is_pyarrows(path: Path) -> None:
    assert read_table(path).equals(pq.read_table(path))
    assert read_table(pa.py_buffer(path.read_bytes())).equals(pq.read_table(path))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_no_thread_is_started(path: Path) -> None:
    argv = [sys.executable, "-c", COUNT, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_no_other_module_reads_parquet_with_threads() -> None:
    readers = {
        str(path.relative_to(PACKAGE))
        for path in python_files("dllm")
        if "pq.read_table" in (text := path.read_text()) or "ParquetFile(" in text
    }
    assert readers == {"prompts/files/arrow.py"}
