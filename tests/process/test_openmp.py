"""Short spins: set before torch loads, in every process of a verb, and never against the user's own settings."""

import os
import subprocess
import sys

import pytest

from dllm.process import openmp

ASK = """
import os, sys
from dllm.process.openmp import spin_briefly
assert "torch" not in sys.modules
spin_briefly()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, openmp.COUNT), ({openmp.SPINS: "7"}, "7"), ({openmp.POLICY: "ACTIVE"}, "None")],
)
def test_the_users_settings_are_left(given: dict[str, str], expected: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in (openmp.SPINS, openmp.POLICY)}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment | given, capture_output=True, text=True)
    assert done.stdout.split() == [expected], done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="torch has GNU's OpenMP on Linux")
def test_a_verb_sets_it_before_torch_loads() -> None:
    """OMP_DISPLAY_ENV makes libgomp print its settings when it loads."""
    environment = {key: value for key, value in os.environ.items() if key not in (openmp.SPINS, openmp.POLICY)}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    argv = [
        sys.executable,
        "-m",
        "dllm",
        "generate",
        "--checkpoint",
        "nowhere",
        "--prompt",
        "x",
        "--target",
        "builtin:tiny",
    ]
    said = subprocess.run(argv, env=environment, capture_output=True, text=True).stderr
    assert f"GOMP_SPINCOUNT = '{openmp.COUNT}'" in said
